"""The page that quotes the benchmarks: their tables lie between HTML comments, under a line on their origin."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

import psutil

from loraover.common.atomic_output import publish_text
from loraover.common.errors import ConfigError
from loraover.common.provenance import environment, processor

from benchmarks.shown import Plot

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"


@dataclass(frozen=True)
class Origin:
    """Where and when figures were measured.

    Args:
        commit: Short hash of the commit.
        is_clean: Whether the files were those of the commit, apart from what a benchmark writes.
        day: Date in UTC.
        machine: Processor, number of cores and memory, and how busy the machine was before.
        versions: Versions of packages, by name.
    """

    commit: str
    is_clean: bool
    day: date
    machine: str
    versions: dict[str, str]

    def line(self, gpu: str | None) -> str:
        """Return the line above the tables."""
        state = "" if self.is_clean else " with uncommitted changes"
        device = "" if gpu is None else f"GPU: {gpu}; "
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"*Measured at commit {self.commit}{state}, {self.day}: {self.machine}; {device}{versions}.*"


def find_origin(root: Path = ROOT, page: Path = PAGE) -> Origin:
    """Describe the commit, the machine and the packages."""
    written = [f":(exclude){path.relative_to(root)}" for path in (page, plots_of(page), page.with_suffix(".json"))]
    commit = _git(root, "rev-parse", "--short", "HEAD").strip()
    changes = _git(root, "status", "--porcelain", "--", ".", *written)
    memory = psutil.virtual_memory().total / 2**30
    found = environment("onnxruntime")
    return Origin(
        commit,
        not changes.strip(),
        datetime.now(UTC).date(),
        f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, load {os.getloadavg()[0]:.1f} before",
        {name: found[name] for name in ("python", "torch", "transformers", "peft", "onnxruntime")},
    )


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(
            f"{root}: the commit that is measured is unknown, since `git {arguments[0]}` failed with "
            f"{done.stderr.strip()!r}; use a git checkout, or --no-write."
        )
    return done.stdout


def check_markers(names: Iterable[str], page: Path = PAGE) -> None:
    """Raise ConfigError unless a page has a place for the tables of every benchmark."""
    text = page.read_text(encoding="utf-8")
    for name in names:
        replaced(text, name, "", page)


def replaced(text: str, name: str, content: str, page: Path = PAGE) -> str:
    """Return a page's text with other content between the markers of a benchmark."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if (text.count(begin), text.count(end)) != (1, 1) or text.index(begin) > text.index(end):
        raise ConfigError(
            f"{page}: expected the line {begin!r} and below it {end!r}, each once; "
            f"found {text.count(begin)} and {text.count(end)} of them. Mend the page, or use --no-write."
        )
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.partition(end)[2]}"


def write_figures(name: str, line: str, parts: Sequence[str | Plot], page: Path = PAGE) -> None:
    """Put a benchmark's tables and plots into a page."""
    content = [line]
    for part in parts:
        if isinstance(part, Plot):
            file = plots_of(page) / f"{part.name}.svg"
            file.parent.mkdir(exist_ok=True)
            publish_text(file, part.svg)
            content.append(f"![{part.description}]({file.relative_to(page.parent)})")
        else:
            content.append(part)
    text = page.read_text(encoding="utf-8")  # now, since somebody may have changed it during the benchmark
    publish_text(page, replaced(text, name, "\n\n".join(content), page))


def plots_of(page: Path) -> Path:
    """Return the folder of a page's plots."""
    return page.with_suffix("")
