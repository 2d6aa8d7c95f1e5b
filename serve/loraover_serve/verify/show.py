"""Verifications and recordings for people, on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from loraover.reporting.html_page import in_sentences
from loraover.reporting.palette import terminal_color
from loraover.reporting.reporter import print_line
from loraover_serve.verify.html import distances_table
from loraover_serve.verify.report import VerifyReport
from loraover_serve.verify.request import RecordRequest, VerifyRequest

if TYPE_CHECKING:
    from loraover_serve.verify.recorder import RecordReport


def show_report(report: VerifyReport, request: VerifyRequest, console: Console) -> None:
    """Print one table for all engines, each verdict in a line with its reason below, and the output.

    Args:
        report: The report.
        request: Request that the report answers.
        console: Where to print.
    """
    console.print(distances_table(report.engines, report.reference))
    for result in report.engines:
        print_line(console, f"{result.engine}: {result.plainly}", terminal_color(result.verdict))
        if in_sentences(result.reason) not in result.plainly:
            print_line(console, f"  {result.reason}")
        if result.known_faults:
            known = "; ".join(result.known_faults)
            print_line(console, f"  note: known faults of {result.engine} {result.version}: {known} (docs/faults.md)")
    if request.output is not None:
        print_line(console, f"wrote {request.output}")


def show_recording(report: RecordReport, request: RecordRequest, console: Console) -> None:
    """Print what was recorded, and what it can decide.

    Args:
        report: The report.
        request: Request that the report answers.
        console: Where to print.
    """
    print_line(
        console,
        f"{report.questions} questions with {report.positions} positions, {report.variants} faults, "
        f"{report.size_bytes / 1000:.0f} kB",
    )
    if report.stale:
        print_line(console, f"long questions with a {', a '.join(report.stale)}")
    error = "unknown" if report.half is None else f"known within {report.half:.2g}"
    if report.decides:
        text, color = "enough to separate a right adapter from one that is 20 % off, even with twice the noise", "green"
    else:
        text, color = "too few questions for a verdict with twice the noise; give more with --prompts", "yellow"
    print_line(console, f"on a server in bfloat16, the strength of the adapter is {error}: {text}", color)
    print_line(console, f"wrote {report.path}")
