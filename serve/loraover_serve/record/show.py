"""A recording for people, on a terminal."""

from __future__ import annotations

from rich.console import Console

from loraover.reporting.reporter import print_line
from loraover_serve.record.recorder import RecordReport
from loraover_serve.record.request import RecordRequest


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
