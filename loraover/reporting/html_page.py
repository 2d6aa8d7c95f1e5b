"""HTML pages that need no network, with plots that take the colour of their text from the page."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

BASE_TEMPLATE = "page.html.j2"
INK = "#0a0b0c"  # replaced by the page's text colour
COLORS = ("#3b7dd8", "#d9822b", "#2e9e6b", "#c2406b", "#8a63d2", "#7a8a99")
"""Colours that can be told apart on light and dark pages, and by people who do not see red and green."""


def render_page(template: str, **values: Any) -> str:
    """Render a page.

    Args:
        template: Text of a Jinja template that extends "page.html.j2".
        values: Values of the template's variables; every text is escaped.
    """
    from jinja2 import DictLoader, Environment, StrictUndefined

    base = files("loraover.reporting").joinpath(BASE_TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(loader=DictLoader({BASE_TEMPLATE: base}), autoescape=True, undefined=StrictUndefined)
    return environment.from_string(template).render(**values)


@contextmanager
def svg_axes(width: float, height: float) -> Iterator[tuple[Any, list[str]]]:
    """Make axes to draw on, and an SVG of them after the block.

    Args:
        width: Width in inches.
        height: Height in inches.

    Yields:
        The axes, and a list that holds the SVG after the block.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    style = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 11,
        "axes.facecolor": "none",
        "text.parse_math": False,
    } | ink
    drawn: list[str] = []
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        yield axes, drawn
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    drawn.append(svg[svg.index("<svg") :].replace(INK, "currentColor"))
