"""A fleet's rows and their table as text for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from loraover.reporting.palette import terminal_color
from loraover.reporting.reporter import print_line
from loraover.reporting.terminal_table import terminal_table
from loraover_export.fleet.row import FleetReport, FleetRow

WORDS = {"right as exported": "export", "right on some": "some"}
"""Verdicts as a table has them, where they are long."""
KEY = (
    "right: as it is; export: right only as exported; refused or wrong: in both forms, wrong without a message; "
    "some: right on some engines"
)


def show_row(row: FleetRow, progress: str, console: Console) -> None:
    """Print that an adapter is done, in one line.

    Args:
        row: What became of it.
        progress: How many adapters are done, and how long the others take.
        console: Console to print to.
    """
    print_line(console, f"{progress}: {row.verdict}: {row.source}", terminal_color(row.verdict))


def show_report(report: FleetReport, console: Console) -> None:
    """Print a table with a line for each adapter, the reasons below it, and how many adapters have each verdict."""
    engines, last = report.engines, () if report.engines else ("error",)
    heads = ("verdict", "adapter", *engines, *last)
    rows: list[list[str | Text]] = [
        [
            Text(WORDS.get(row.verdict, row.verdict), terminal_color(row.verdict)),
            row.source,
            *(_cell(row, engine) for engine in engines),
            *(["" if row.error is None else f"{row.error:.2g}"] if last else []),
        ]
        for row in report.rows
    ]
    console.print(terminal_table(heads, rows, names=heads[1:2], words=("verdict", *engines)))
    if engines:
        print_line(console, KEY)
    for row in report.rows:
        facts = [row.kind, None if row.rank is None else f"rank {row.rank}", row.told]
        told = ", ".join(fact for fact in facts if fact)
        lines = [line for line in row.reason.split("\n") if line]
        print_line(console, "\n  ".join((f"{row.source}: {told or row.verdict}", *lines)))
    text = f"{report.counts()}, of {len(report.rows)} adapters in {report.seconds:.1f} s"
    print_line(console, text, terminal_color(report.verdict))


def _cell(row: FleetRow, engine: str) -> Text:
    """Return a word for the form in which an engine is right on an adapter, or for what it does with every form."""
    if engine not in row.engines:
        return Text("")
    found, form = row.engines[engine], row.served(engine)
    if form == "as exported":
        return Text(WORDS["right as exported"], terminal_color("right as exported"))
    return Text(found.split()[0], terminal_color(found))
