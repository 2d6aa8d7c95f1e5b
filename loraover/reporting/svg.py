"""Drawing in SVG: shapes, texts and axes. Colours are names of the palette."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from loraover.reporting.palette import PALETTE

Shape = Literal["circle", "square", "diamond", "triangle", "bar"]
Anchor = Literal["start", "middle", "end"]

SIZE = 12.0
"""Height of text, in the units of the picture."""
SMALL, TITLE = 11.0, 26.0
LONGEST_NAME = 100
MOST_MARKS = 6
WIDEST = 0.6
"""Mean width of a letter of a wide sans-serif font, as a share of its height."""


@dataclass(frozen=True)
class Figure:
    """A picture of a report.

    Args:
        name: Name of its file, without the ending.
        description: Title, which is also for readers who do not see the picture.
        parts: What is drawn, as elements of SVG in CSS variables.
        width: Width, in units that are about a pixel.
        caption: Text below it.
    """

    name: str
    description: str
    parts: str
    width: float
    height: float
    caption: str = ""

    @property
    def svg(self) -> str:
        """The picture for a page, whose CSS variables have the colours."""
        box = f"0 0 {number(self.width)} {number(self.height)}"
        size = f'width="{number(self.width)}" height="{number(self.height)}"'
        head = f'<svg viewBox="{box}" {size} role="img" font-family="system-ui, sans-serif">'
        return f"{head}<title>{escape(self.description)}</title>{self.parts}</svg>"

    def file(self) -> str:
        """Return the picture for a file: with the colours of a light page, and its ground."""

        def colored(style: re.Match[str]) -> str:
            return re.sub(r"var\(--(\w+)\)", lambda found: PALETTE[found[1]].light, style[0])

        head, end, rest = re.sub(r'style="[^"]*"', colored, self.svg).partition(">")  # a text has no such marks
        ground = f'<rect width="100%" height="100%" fill="{PALETTE["paper"].light}"/>'
        named = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        return f"{named}{end}{ground}{rest}\n"


def number(value: float) -> str:
    """Return a coordinate with at most two decimals, since reports shall be small."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def short(value: float | None, form: str = ".2g") -> str:
    """Return a figure with two digits, and "-" for None; powers of ten have no zero before them."""
    return "-" if value is None else format(value, form).replace("e-0", "e-").replace("e+0", "e+")


def text_width(text: str, size: float = SIZE) -> float:
    """Estimate the width of a text; fonts differ from one computer to another."""
    return WIDEST * size * len(text)


def fitted(text: str, width: float, size: float = SIZE) -> str:
    """Return a text, with its middle left out if it is wider than `width`."""
    most = max(3, int(width / (WIDEST * size)))
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def stacked(name: str, figures: Sequence[Figure]) -> Figure:
    """Return one figure with others in it, from the top, each under its title."""
    width = max(figure.width for figure in figures)
    drawing = Drawing(width, sum(figure.height + TITLE for figure in figures))
    top = 0.0
    for figure in figures:
        drawing.text(8, top + 18, figure.description)
        drawing.inside(0, top + TITLE, figure)
        top += figure.height + TITLE
    return drawing.figure(name, "; ".join(figure.description for figure in figures))


class Drawing:
    """A picture in the making.

    Args:
        width: Width, in units that are about a pixel.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self._parts: list[str] = []

    def line(
        self, points: Sequence[tuple[float, float]], color: str, *, width: float = 1.5, dash: str | None = None
    ) -> None:
        """Draw a line through points."""
        path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        dashed = "" if dash is None else f' stroke-dasharray="{dash}"'
        style = f"fill:none;stroke:var(--{color});stroke-width:{number(width)}"
        self._parts.append(f'<polyline points="{path}" style="{style}"{dashed}/>')

    def rect(self, x: float, y: float, width: float, height: float, color: str, opacity: float = 1) -> None:
        """Draw a filled rectangle."""
        box = " ".join(
            f'{name}="{number(value)}"'
            for name, value in (("x", x), ("y", y), ("width", max(0.0, width)), ("height", height))
        )
        self._parts.append(f'<rect {box} style="fill:var(--{color});fill-opacity:{number(opacity)}"/>')

    def mark(self, x: float, y: float, color: str, shape: Shape = "circle", radius: float = 4.5) -> None:
        """Draw a point."""
        style = f'style="fill:var(--{color})"'
        if shape == "circle":
            self._parts.append(f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(radius)}" {style}/>')
            return
        around = {
            "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
            "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
            "triangle": ((0, -1.2), (1.1, 0.9), (-1.1, 0.9)),
            "bar": ((-0.3, -1.6), (0.3, -1.6), (0.3, 1.6), (-0.3, 1.6)),
        }[shape]
        points = " ".join(f"{number(x + radius * a)},{number(y + radius * b)}" for a, b in around)
        self._parts.append(f'<polygon points="{points}" {style}/>')

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = SIZE,
        anchor: Anchor = "start",
        color: str = "ink",
        turn: float = 0,
    ) -> None:
        """Write a text, whose baseline is at `y`, turned by `turn` degrees."""
        place = f'x="{number(x)}" y="{number(y)}"'
        turned = f' transform="rotate({number(turn)} {number(x)} {number(y)})"' if turn else ""
        style = f"fill:var(--{color});font-size:{number(size)}px;text-anchor:{anchor}"
        self._parts.append(f'<text {place} style="{style}"{turned}>{escape(text)}</text>')

    @property
    def parts(self) -> str:
        """Elements of SVG that were drawn."""
        return "".join(self._parts)

    def inside(self, x: float, y: float, part: Drawing | Figure) -> None:
        """Put another picture at a place; what lies beyond its own edges is cut off."""
        box = f'x="{number(x)}" y="{number(y)}" width="{number(part.width)}" height="{number(part.height)}"'
        self._parts.append(f'<svg {box} overflow="hidden">{part.parts}</svg>')

    def figure(self, name: str, description: str) -> Figure:
        """Return the picture; characters that do not belong in a file name are replaced in its name."""
        name = re.sub(r"[^\w-]+", "-", name)[:LONGEST_NAME]
        return Figure(name, description, self.parts, self.width, self.height)


@dataclass(frozen=True)
class Axis:
    """A scale of a figure.

    Args:
        label: Name of the quantity, with its unit.
        low: Value at the beginning.
        high: Value at the end.
        is_log: Whether the scale is logarithmic.
        ticks: Values with a number; None chooses round ones.
        form: Format of the numbers.
    """

    label: str
    low: float
    high: float
    is_log: bool = False
    ticks: Sequence[float] | None = None
    form: str = "g"

    @classmethod
    def around(cls, label: str, values: Sequence[float], *, is_log: bool = False, pad: float = 0.06) -> Axis:
        """Return an axis on which all values have room; a logarithmic one leaves out values that are not positive.

        Values beyond 1e300, whose differences are infinite in floating point, lie outside.
        """
        most = 300.0 if is_log else 1e300
        scaled = [math.log10(v) if is_log else v for v in values if math.isfinite(v) and (v > 0 or not is_log)]
        found = [max(-most, min(most, value)) for value in scaled]
        low, high = (min(found), max(found)) if found else (0.0, 1.0)
        room = pad * (high - low) or (0.5 if is_log else 0.5 * abs(high) or 1.0)
        first, last = (10 ** max(-most, min(most, end)) if is_log else end for end in (low - room, high + room))
        return cls(label, first, last, is_log=is_log)

    def share(self, value: float) -> float:
        """Return the place of a value, from 0 at the beginning to 1 at the end; beyond them for one outside."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        return (self._scaled(value) - low) / (high - low)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.is_log else value

    def marks(self) -> list[tuple[float, str]]:
        """Return the values that have a number, with these numbers."""
        chosen: list[float] = []
        if self.ticks is not None:
            chosen = [*self.ticks]
        elif self.is_log:
            powers = [10.0**k for k in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)]
            decades = [power for power in powers if self.low <= power <= self.high]
            between = [factor * power for power in powers for factor in (1, 2, 5)]
            if len(decades) < 3:
                chosen = [value for value in between if self.low <= value <= self.high]
            else:
                chosen = decades[:: math.ceil(len(decades) / MOST_MARKS)]
        if not chosen and self.ticks is None:  # also for a logarithmic scale between two round values
            rough = (self.high - self.low) / MOST_MARKS
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            chosen = [i * step for i in range(first, last + 1)]
        return [(value, short(value, self.form)) for value in chosen]
