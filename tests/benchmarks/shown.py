"""What a benchmark shows: tables, and plots as SVG files beside the page that quotes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraover.reporting.html_page import COLORS, svg_axes

WIDTH = 100
"""Columns of a terminal into which every table fits."""
PAPER = "background:#ffffff;color:#1b1b1b"
"""Ground and ink of a plot: an image of a page cannot take the page's colours."""


@dataclass(frozen=True)
class Point:
    """A measured value with its 95 % interval, at a place on the horizontal axis."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Plot:
    """A plot in the SVG format.

    Args:
        name: Name of its file, without the ending.
        description: Text for readers who do not see it.
        svg: The picture.
    """

    name: str
    description: str
    svg: str


Shown = Table | Plot


def draw_curves(curves: Mapping[str, Sequence[Point]], *, x: str, y: str, ticks: Sequence[float], names: str) -> str:
    """Draw curves with their intervals on logarithmic axes, as an SVG.

    Args:
        curves: Points of each curve, by the name in the legend.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        ticks: Places on the horizontal axis that have a name.
        names: Format of these names, such as "{:,.0f}".
    """
    with svg_axes(5, 3.6) as (axes, drawn):
        axes.set_xscale("log")
        axes.set_yscale("log")
        for color, marker, (name, points) in zip(COLORS, "osD^vX", curves.items(), strict=False):
            places, values = [point.x for point in points], [point.y for point in points]
            ends = [[p.y - p.low for p in points], [p.high - p.y for p in points]]
            axes.errorbar(places, values, yerr=ends, color=color, marker=marker, ms=5, capsize=3, label=name)
        axes.set_xticks(ticks, [names.format(tick) for tick in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.25)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.legend(frameon=False, fontsize=10)
    return drawn[0].replace("<svg ", f'<svg style="{PAPER}" ', 1)


def console() -> Console:
    """Return the console on which benchmarks print."""
    return Console(width=WIDTH)


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
