"""Colours of all reports: each has one meaning, and one shade for light pages and one for dark ones.

A page and its figures name colours by their meaning, as CSS variables such as `var(--subject)`. Every colour of text
and lines has a contrast of at least 4.5:1 with both grounds (WCAG 2.2, criterion 1.4.3). Figures also distinguish by
shape or by name, for readers who do not see a difference of colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tone = Literal["good", "bad", "open"]


@dataclass(frozen=True)
class Color:
    """Colour of a palette: its shades on light and dark pages, as "#rrggbb", and what it stands for in every report."""

    light: str
    dark: str
    meaning: str


GROUNDS = {
    "paper": Color("#ffffff", "#15181b", "ground of the page"),
    "box": Color("#f1f3f5", "#22272c", "ground of the verdict and of commands"),
}
RULES = {"line": Color("#d3d9df", "#3b444c", "rules of tables and grids of figures, which carry no meaning")}
INKS = {
    "ink": Color("#1c2024", "#e6e8ea", "text and axes"),
    "faint": Color("#57616b", "#a6b0b9", "explanations"),
    "subject": Color("#ae2a78", "#f38fc7", "subject of the report: a folded adapter, LoRA-Over"),
    "baseline": Color("#2460b5", "#82b5ff", "what it is compared with: a plain LoRA"),
    "noise": Color("#5c6873", "#aab5bf", "noise: two copies of one thing, the engine's base model, random roundings"),
    "base": Color("#0a726d", "#4fd0c7", "the base model without an adapter"),
    "effect": Color("#7a5230", "#dcae80", "how far an adapter moves the base model"),
    "other": Color("#6546bd", "#bba6f7", "anything else, which its label names"),
    "good": Color("#1a7040", "#63d093", "a good verdict, and the range in which a figure is good"),
    "bad": Color("#b3261e", "#ff978e", "a bad verdict"),
    "open": Color("#7a5500", "#e8b64c", "no verdict: too short, or too noisy"),
}
PALETTE = GROUNDS | RULES | INKS

GOOD = ("as trained", "consistent", "equivalent", "passed", "right", "prepared")
BAD = ("differs", "different", "failed", "wrong silently", "error")
OPEN = ("inconclusive", "refused", "right as exported", "right on some")
TERMINAL_COLORS = {"good": "green", "bad": "red", "open": "yellow"}
"""Colours of a terminal by the tones of a verdict."""


def tone_of(verdict: str) -> Tone:
    """Return whether a verdict of any command is good or bad; one that is neither decides nothing."""
    return "good" if verdict in GOOD else "bad" if verdict in BAD else "open"


def terminal_color(verdict: str) -> str:
    """Return the colour of a verdict on a terminal."""
    return TERMINAL_COLORS[tone_of(verdict)]


def css_variables() -> str:
    """Return the palette as CSS variables: light, dark where the reader prefers that, and light on printed paper."""
    light = " ".join(f"--{name}: {color.light};" for name, color in PALETTE.items())
    dark = " ".join(f"--{name}: {color.dark};" for name, color in PALETTE.items())
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    )
