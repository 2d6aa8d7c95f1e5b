"""Verifications and recordings for people, on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from loraover.reporting.html_page import in_sentences
from loraover.reporting.palette import terminal_color
from loraover.reporting.reporter import print_line
from loraover.reporting.svg import short
from loraover.reporting.terminal_table import terminal_table
from loraover_serve.verify.record_request import RecordRequest
from loraover_serve.verify.report import EngineResult, VerifyReport
from loraover_serve.verify.request import VerifyRequest

if TYPE_CHECKING:
    from loraover_serve.verify.recorder import RecordReport


def show_report(report: VerifyReport, request: VerifyRequest, console: Console) -> None:
    """Print one table for all engines, each verdict in a line with its reason below, and the output.

    Args:
        report: The report.
        request: What it answers.
        console: Where to print.
    """
    heads = ("verdict", "engine", "strength", "noise", "adapter", "effect", "same\ntext")
    rows: list[list[str | Text]] = [
        [Text(result.verdict, terminal_color(result.verdict)), result.engine, *_figures(result)]
        for result in report.engines
    ]
    title = f"RMS distance of logprobs from {report.reference}, in nats"
    console.print(terminal_table(heads, rows, words=heads[:1], names=heads[1:2], title=title))
    for result in report.engines:
        print_line(console, f"{result.engine}: {result.plainly}", terminal_color(result.verdict))
        if in_sentences(result.reason) not in result.plainly:
            print_line(console, f"  {result.reason}")
    if request.output is not None:
        print_line(console, f"wrote {request.output}")


def _figures(result: EngineResult) -> list[str]:
    """Strength, noise of the base model, distance of the adapter, its effect, share of equal answers."""
    noise, off = (None if each is None else each.rms for each in (result.base, result.adapter))
    found = result.strength
    strength = "-" if found is None else f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
    distances = [short(distance) for distance in (noise, off, result.effect)]
    return [strength, *distances, "-" if result.greedy is None else f"{result.greedy.equal:.0%}"]


def show_recording(report: RecordReport, request: RecordRequest, console: Console) -> None:
    """Print what was recorded, and what it can decide.

    Args:
        report: The report.
        request: What it answers.
        console: Where to print.
    """
    print_line(
        console,
        f"{report.questions} questions with {report.positions} positions, {report.variants} faults, "
        f"{report.size_bytes / 1000:.0f} kB",
    )
    error = "unknown" if report.half is None else f"known within {report.half:.2g}"
    if report.decides:
        text, color = "enough to separate a right adapter from one that is 20 % off, even with twice the noise", "green"
    else:
        text, color = "too few questions for a verdict with twice the noise; give more with --prompts", "yellow"
    print_line(console, f"on a server in bfloat16, the strength of the adapter is {error}: {text}", color)
    print_line(console, f"wrote {report.path}")
