"""A reporter whose lines a test reads."""

from __future__ import annotations

from loraover.common.reporter import Reporter


class Lines(Reporter):
    """Keeps the lines that it receives."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)
