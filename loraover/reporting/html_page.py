"""Reports as HTML pages: one template for all, which needs no network, and no script but that of a table of many rows.

A page begins with its verdict in one sentence, then shows the figure that decides, and ends with its origin. A report
supplies the verdict, figures, tables and a template that extends "page.html.j2"; style and colours are the page's.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from loraover.common.errors import ConfigError
from loraover.reporting.palette import Tone, css_variables, tone_of
from loraover.reporting.svg import Figure

SHARED = ("page.html.j2", "parts.html.j2")
FIGURES = "figures"
"""Folder of a report's figures."""


@dataclass(frozen=True)
class Verdict:
    """Verdict of a report, as its page shows it.

    Args:
        tone: "good", "bad", "open" if nothing could be decided, or "plain" if nothing was to be.
        word: The verdict in a few words.
        sentence: The verdict in plain sentences with their figures; the page keeps its line breaks.
    """

    tone: Tone | Literal["plain"]
    word: str
    sentence: str


@dataclass(frozen=True)
class Origin:
    """How a report was made.

    Args:
        command: Command line that makes it again.
        day: Day on which it was made, such as "2026-03-01"; None: unknown.
        hardware: Machine in words.
        versions: Versions of packages, by name.
    """

    command: str
    day: str | None
    hardware: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Page:
    """A page and its figures.

    Args:
        html: The page, with its figures in it.
    """

    html: str
    figures: Sequence[Figure]

    def write(self, path: Path) -> None:
        """Write the page, in a folder that is published later, and each figure into a folder beside it."""
        for file, content in self.files(path).items():
            file.parent.mkdir(exist_ok=True)
            file.write_text(content, encoding="utf-8")

    def files(self, path: Path) -> dict[Path, str]:
        """Return the contents of all files by their path: the page, and each figure in a folder beside it."""
        found, folder = {path: self.html}, path.parent / FIGURES
        for figure in self.figures:
            file, number = folder / f"{figure.name}.svg", 1
            while file in found:  # names that differ only in what no file name should have
                number += 1
                file = folder / f"{figure.name}-{number}.svg"
            found[file] = figure.file()
        return found


def make_page(
    template: str,
    *,
    title: str,
    heading: str,
    verdict: Verdict,
    facts: Mapping[str, str | None],
    origin: Origin,
    figures: Sequence[Figure] = (),
    script: str | None = None,
    **values: Any,
) -> Page:
    """Make the page of a report.

    Args:
        template: Text of a Jinja template that extends "page.html.j2".
        title: Title of the browser's window.
        heading: The question that the report answers.
        verdict: The answer.
        facts: Facts below the verdict, such as the engine and the base model; those that are None are left out. The
            machine and the day follow.
        origin: How the report was made.
        figures: All figures of the report.
        script: Text of the page's own script, the only one that a browser runs in it; None means that it runs none.
        values: Further variables of the template; every text is escaped, and figures are named as here.
    """
    from jinja2 import DictLoader, Environment, StrictUndefined

    room = files("loraover.reporting")
    shared = {name: room.joinpath(name).read_text(encoding="utf-8") for name in SHARED}
    environment = Environment(
        loader=DictLoader(shared), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["tone_of"] = tone_of
    shown = {**facts, "machine": origin.hardware or None, "date": origin.day}
    policy = "default-src 'none'; style-src 'unsafe-inline'"  # a browser loads nothing from elsewhere
    if script is not None:
        digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    html = environment.from_string(template).render(
        title=title,
        heading=heading,
        in_sentences=in_sentences,
        verdict=verdict,
        facts={name: value for name, value in shown.items() if value is not None},
        origin=origin,
        palette=css_variables(),
        policy=policy,
        script=script,
        figures=figures,
        **values,
    )
    return Page(html, figures)


def check_new(path: Path, ending: str) -> None:
    """Raise ConfigError unless a file is new and its name has the right ending."""
    if path.suffix != ending:
        raise ConfigError(f"{path}: expected a name that ends in {ending}.")
    if path.exists():
        raise ConfigError(f"{path}: is there already; name a new file.")


def clauses(text: str) -> list[str]:
    """Return the clauses that semicolons join, outside of brackets."""
    return re.split(r";\s+(?![^()]*\))", text.rstrip("."))


def in_sentences(text: str) -> str:
    """Return the clauses of a text as sentences; see `clauses`."""
    return " ".join(f"{clause[:1].upper()}{clause[1:]}." for clause in clauses(text))
