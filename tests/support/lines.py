"""Reporters whose lines a test reads, or at which it interrupts a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loraover.common.reporter import Reporter


class Lines(Reporter):
    """Keeps the lines that it receives."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


class Acting(Reporter):
    """Calls a function at every task whose label begins so."""

    def __init__(self, begins: str, act: Callable[[], object]) -> None:
        self.begins, self.act = begins, act

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        if label.startswith(self.begins):
            self.act()
        yield lambda done: None
