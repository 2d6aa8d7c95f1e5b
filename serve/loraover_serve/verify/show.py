"""A verification for people, on a terminal."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from loraover.reporting.reporter import print_line
from loraover_serve.verify.report import EngineResult, VerifyReport
from loraover_serve.verify.request import VerifyRequest

COLORS = {"as trained": "green", "differs": "red", "failed": "red", "inconclusive": "yellow"}


def show_report(report: VerifyReport, request: VerifyRequest, console: Console) -> None:
    """Print one table for all engines, the reason for each verdict, and the output.

    Args:
        report: The report.
        request: What it answers.
        console: Where to print.
    """
    table = Table(
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title=f"RMS distance of logprobs from {report.reference}, in nats",
    )
    for column in ("engine", "verdict", "strength", "noise", "adapter", "effect", "same text"):
        table.add_column(column, no_wrap=True)
    for result in report.engines:
        table.add_row(result.engine, f"[{COLORS[result.verdict]}]{result.verdict}[/]", *_figures(result))
    console.print(table)
    for result in report.engines:
        print_line(console, f"{result.engine}: {result.verdict}: {result.reason}", COLORS[result.verdict])
    if request.output is not None:
        print_line(console, f"wrote {request.output}")


def _figures(result: EngineResult) -> list[str]:
    """Strength, noise of the base model, distance of the adapter, its effect, share of equal answers."""
    distances = [result.base and result.base.rms, result.adapter and result.adapter.rms, result.effect]
    shown = ["-" if distance is None else f"{distance:.1e}" for distance in distances]
    strength = "-" if result.strength is None else str(result.strength)
    return [strength, *shown, "-" if result.greedy is None else f"{result.greedy.equal:.0%}"]
