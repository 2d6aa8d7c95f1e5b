"""A fleet's rows and their summary as text for a terminal."""

from __future__ import annotations

from rich.console import Console

from loraover.reporting.palette import terminal_color
from loraover.reporting.reporter import print_line
from loraover_export.fleet.row import FleetReport, FleetRow


def show_row(row: FleetRow, progress: str, console: Console) -> None:
    """Print what became of one adapter, in one line.

    Args:
        row: What became of it.
        progress: How many adapters are done, and how long the others take.
        console: Console to print to.
    """
    facts = [row.kind, None if row.rank is None else f"rank {row.rank}", row.done, row.reason]
    facts += [None if row.error is None else f"error {row.error:.2g}", "from the cache" if row.cached else None]
    told = ", ".join(fact for fact in facts if fact)
    print_line(
        console, f"{row.verdict:<9} {row.source}: {told} ({row.seconds:.1f} s; {progress})", terminal_color(row.verdict)
    )


def show_summary(report: FleetReport, console: Console) -> None:
    """Print how many adapters have each verdict."""
    text = f"{report.counts()}, of {len(report.rows)} adapters in {report.seconds:.1f} s"
    print_line(console, text, "green" if report.passed else "red")
