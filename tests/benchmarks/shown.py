"""What a benchmark shows: tables, and plots as SVG files beside the page that quotes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraover.reporting.figures import Curve, curves_figure
from loraover.reporting.svg import Axis

WIDTH = 100
"""Columns of a terminal into which every table fits."""
COLORS = ("baseline", "subject", "base", "open", "other", "noise")
"""Colours of curves, which differ from plot to plot and so have no meaning here."""


@dataclass(frozen=True)
class Point:
    """A measured value with its 95 % interval, at a place on the horizontal axis."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Plot:
    """A plot in the SVG format."""

    name: str
    description: str
    svg: str


Shown = Table | Plot
Numbers = dict[str, Any]
"""What was measured, for programs: it goes into a benchmark's JSON only."""


def draw_curves(curves: Mapping[str, Sequence[Point]], *, x: str, y: str, ticks: Sequence[float], names: str) -> str:
    """Draw curves with their intervals on logarithmic axes, as an SVG."""
    drawn = [
        Curve(name, color, [(p.x, p.y) for p in points], [(p.low, p.high) for p in points])
        for color, (name, points) in zip(COLORS, curves.items(), strict=False)
    ]
    every = [point for points in curves.values() for point in points]
    across = Axis.around(x, [point.x for point in every], is_log=True)
    up = Axis.around(y, [end for point in every for end in (point.low, point.high)], is_log=True)
    return curves_figure(y, f"{y} against {x}", drawn, replace(across, ticks=ticks, form=names), up).file()


def console() -> Console:
    """Return the console on which benchmarks print."""
    return Console(width=WIDTH)


def table_of(title: str, *columns: str, words: int = 1, caption: str | None = None) -> Table:
    """Make an empty table.

    Args:
        title: Text above it.
        columns: Names of its columns.
        words: Number of columns of words, which come first and begin at the left; numbers end at the right.
        caption: Text below it.
    """
    table = Table(box=SIMPLE, title=title, caption=caption)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < words else "right")
    return table


def to_markdown(table: Table) -> str:
    """Return a table in Markdown, with its title above and its caption below."""
    columns = [[plain(column.header), *map(plain, column.cells)] for column in table.columns]
    rule = ["---:" if column.justify == "right" else "---" for column in table.columns]
    head, *rows = zip(*columns, strict=True)
    lines = [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]
    title = [f"**{plain(table.title)}**", ""] if table.title else []
    caption = ["", plain(table.caption)] if table.caption else []
    return "\n".join((*title, *lines, *caption))


def plain(cell: object) -> str:
    """Return a cell's text without the markup of a terminal, as Markdown takes it in a table."""
    text = Text.from_markup(cell).plain if isinstance(cell, str) else str(cell)
    return " ".join(text.split()).replace("|", "\\|")
