"""Figures that reports share: rows with intervals and points on one axis, and curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraover.reporting.svg import SIZE, SMALL, Axis, Drawing, Figure, Shape, fitted, text_width

WIDTH = 380.0
EDGE = 8.0
LINE = 16.0
"""Distance of two lines of text."""
STRIP = 9.0
"""Half the height of the strip in which a row's values are drawn."""
DASHES = (None, "6 3", "2 3", "8 3 2 3")
SHAPES: tuple[Shape, ...] = ("circle", "square", "diamond", "triangle")


@dataclass(frozen=True)
class Point:
    """A value in a row.

    Args:
        color: Name of its colour.
        shape: Its shape.
    """

    value: float
    color: str
    shape: Shape = "circle"


@dataclass(frozen=True)
class Band:
    """A range of a row, or of the axis x of curves, shaded.

    Args:
        low: Its beginning.
        high: Its end.
        color: Name of its colour.
    """

    low: float
    high: float
    color: str = "good"


@dataclass(frozen=True)
class FigureRow:
    """A row of a figure.

    Args:
        label: Text above it.
        note: Figures above it, at the right.
        points: Values; the last are drawn above the others.
        interval: Ends of a line in the colour of the first point.
        bands: Shaded ranges.
    """

    label: str
    note: str = ""
    points: Sequence[Point] = ()
    interval: tuple[float, float] | None = None
    bands: Sequence[Band] = ()

    @property
    def is_long(self) -> bool:
        """Whether label and note need two lines."""
        return bool(self.note) and text_width(f"{self.label}  {self.note}") > WIDTH - 2 * EDGE


Key = tuple[str, str, Shape | None]
"""Entry of a legend: text, colour, and shape; None shows a shaded range."""


def rows_figure(
    name: str,
    description: str,
    rows: Sequence[FigureRow],
    axis: Axis,
    *,
    keys: Sequence[Key] = (),
    band: Band | None = None,
    reference: float | None = None,
) -> Figure:
    """Draw rows above one axis. Intervals that leave the axis end in an arrow.

    The range `band` is shaded in all rows, and a vertical line stands at `reference`. The description is for readers
    who do not see the figure.
    """
    lines = 2 if any(row.is_long for row in rows) else 1
    top, height = _legend_height(keys), lines * LINE + 26
    bottom = top + len(rows) * height
    drawing, plot = Drawing(WIDTH, bottom + 42), _Plot(axis, EDGE, WIDTH - EDGE)
    _legend(drawing, keys)
    for i, row in enumerate(rows):
        _row(drawing, plot, row, top + i * height, lines, band, reference)
    _bottom_axis(drawing, plot, bottom)
    return drawing.figure(name, description)


@dataclass(frozen=True)
class _Plot:
    axis: Axis
    left: float
    right: float

    def at(self, value: float) -> float:
        return self.left + self.axis.share(value) * (self.right - self.left)

    def clamped(self, value: float) -> float:
        return min(max(self.at(value), self.left), self.right)


def _row(
    drawing: Drawing, plot: _Plot, row: FigureRow, top: float, lines: int, band: Band | None, reference: float | None
) -> None:
    room, y = WIDTH - 2 * EDGE, top + lines * LINE + 12
    drawing.text(EDGE, top + SIZE, fitted(row.label, room))
    drawing.text(WIDTH - EDGE, y - 16, fitted(row.note, room), anchor="end", color="faint")
    drawing.rect(EDGE, y - STRIP, room, 2 * STRIP, "box")
    if band is not None:
        _shade(drawing, plot, band, y, STRIP)
    for value, _ in plot.axis.marks():
        drawing.line([(plot.at(value), y - STRIP), (plot.at(value), y + STRIP)], "line", width=0.7)
    if reference is not None:
        drawing.line([(plot.at(reference), y - STRIP), (plot.at(reference), y + STRIP)], "ink", width=1)
    for each in row.bands:
        _shade(drawing, plot, each, y, STRIP)
    if row.interval is not None:
        low, high = row.interval
        color = row.points[0].color
        drawing.line([(plot.clamped(low), y), (plot.clamped(high), y)], color, width=3)
        for end, direction in ((low, -1), (high, 1)):
            x = plot.clamped(end)
            if abs(plot.at(end) - x) > 0.5:
                drawing.line([(x - 6 * direction, y - 5), (x, y), (x - 6 * direction, y + 5)], color, width=2)
    for point in row.points:
        x = plot.at(point.value)
        if plot.left - 0.5 <= x <= plot.right + 0.5:
            drawing.mark(x, y, point.color, point.shape)


def _shade(drawing: Drawing, plot: _Plot, band: Band, y: float, half: float) -> None:
    left, right = plot.clamped(band.low), plot.clamped(band.high)
    drawing.rect(left, y - half, right - left, 2 * half, band.color, 0.25)


def _bottom_axis(drawing: Drawing, plot: _Plot, bottom: float) -> None:
    """Draw an axis; numbers that would touch are left out."""
    drawing.line([(plot.left, bottom), (plot.right, bottom)], "ink", width=1)
    free = -1e9
    for value, text in plot.axis.marks():
        x, half = plot.at(value), text_width(text, SMALL) / 2
        drawing.line([(x, bottom), (x, bottom + 4)], "ink", width=1)
        center = min(max(x, half), drawing.width - half)
        if center - half > free + 4:
            drawing.text(center, bottom + 16, text, size=SMALL, anchor="middle")
            free = center + half
    middle = (plot.left + plot.right) / 2
    label = fitted(plot.axis.label, drawing.width - 8, SMALL)
    half = text_width(label, SMALL) / 2
    drawing.text(
        min(max(middle, half), drawing.width - half), bottom + 34, label, size=SMALL, anchor="middle", color="faint"
    )


def _placed(keys: Sequence[Key]) -> list[tuple[float, int]]:
    """Place of each entry of a legend: its left edge and its line."""
    places, x, line = [], EDGE, 0
    for text, _, _ in keys:
        needed = 18 + text_width(text, SMALL) + 10
        if x > EDGE and x + needed > WIDTH:
            x, line = EDGE, line + 1
        places.append((x, line))
        x += needed
    return places


def _legend_height(keys: Sequence[Key]) -> float:
    return LINE * (_placed(keys)[-1][1] + 1) + 6 if keys else 6


def _legend(drawing: Drawing, keys: Sequence[Key]) -> None:
    for (text, color, shape), (x, line) in zip(keys, _placed(keys), strict=True):
        y = 8 + LINE * line
        if shape is None:
            drawing.rect(x, y - 5, 12, 10, color, 0.25)
        else:
            drawing.mark(x + 6, y, color, shape, 4)
        drawing.text(x + 18, y + 4, fitted(text, WIDTH - EDGE - 24, SMALL), size=SMALL)


@dataclass(frozen=True)
class Curve:
    """A line of a figure.

    Args:
        label: Name in the legend.
        color: Name of its colour.
        points: Its points.
        intervals: Ends of a vertical line at each point.
        dots: Single values beside the line, such as those of each seed.
        has_marks: Whether points are marked.
        form: Number of the curve's dashes and shape; None: its place among the curves of its colour.
    """

    label: str
    color: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] = ()
    dots: Sequence[tuple[float, float]] = ()
    has_marks: bool = True
    form: int | None = None


def curves_figure(
    name: str,
    description: str,
    curves: Sequence[Curve],
    x: Axis,
    y: Axis,
    *,
    height: float = 210,
    bands: Sequence[Band] = (),
    more_keys: Sequence[Key] = (),
) -> Figure:
    """Draw curves. Those of one colour differ in dashes and in the shape of their marks.

    What lies beyond the axis y is cut off. The height is that of the plot without legend and axes. The ranges `bands`
    of the axis x are shaded behind the curves, and `more_keys` explain them. The description is for readers who do not
    see the figure.
    """
    forms: list[tuple[Shape, str | None]] = []
    for i, curve in enumerate(curves):
        place = sum(other.color == curve.color for other in curves[:i]) if curve.form is None else curve.form
        forms.append((SHAPES[place % len(SHAPES)], DASHES[place % len(DASHES)]))
    keys: list[Key] = [(curve.label, curve.color, shape) for curve, (shape, _) in zip(curves, forms, strict=True)]
    keys += more_keys
    legend = _legend_height(keys)
    top = legend + LINE + 6
    bottom = top + height
    left = 10 + max(text_width(text, SMALL) for _, text in y.marks())
    drawing = Drawing(WIDTH, bottom + 42)
    _legend(drawing, keys)
    drawing.text(2, legend + 10, fitted(y.label, WIDTH - 4, SMALL), size=SMALL, color="faint")
    plot = _Plot(x, left, WIDTH - EDGE)
    for value, text in y.marks():
        level = bottom - y.share(value) * height
        drawing.line([(left, level), (WIDTH - EDGE, level)], "line", width=0.7)
        drawing.text(left - 6, level + 4, text, size=SMALL, anchor="end")
    for value, _ in x.marks():
        drawing.line([(plot.at(value), top), (plot.at(value), bottom)], "line", width=0.7)
    _bottom_axis(drawing, plot, bottom)
    inner = Drawing(WIDTH - EDGE - left, height)
    for band in bands:
        start, end = (x.share(value) * inner.width for value in (band.low, band.high))
        inner.rect(start, 0, end - start, height, band.color, 0.25)
    for curve, (shape, dash) in zip(curves, forms, strict=True):
        _curve(inner, curve, x, y, shape, dash)
    drawing.inside(left, top, inner)
    return drawing.figure(name, description)


def _curve(inner: Drawing, curve: Curve, x: Axis, y: Axis, shape: Shape, dash: str | None) -> None:
    def place(a: float, b: float) -> tuple[float, float]:
        return x.share(a) * inner.width, (1 - y.share(b)) * inner.height

    for dot in curve.dots:
        inner.mark(*place(*dot), curve.color, shape, 2)
    for (a, _), (low, high) in zip(curve.points, curve.intervals, strict=False):
        inner.line([place(a, low), place(a, high)], curve.color, width=1.2)
    inner.line([place(*point) for point in curve.points], curve.color, width=1.8, dash=dash)
    if curve.has_marks:
        for point in curve.points:
            inner.mark(*place(*point), curve.color, shape, 4)
