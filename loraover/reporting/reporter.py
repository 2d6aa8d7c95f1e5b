"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """Tells a person what is going on."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def line(self, text: str) -> None:
        self.console.print(escape(text), soft_wrap=True, highlight=False)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Progress of one piece of work; the block calls what it gets with the amount done so far."""
        if not self.console.is_terminal:
            self.line(f"{label}: {total}")
            yield lambda done: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(escape(label), total=total)
            yield lambda done: progress.update(task, completed=done)


class _ToReporter(logging.Handler):
    def __init__(self, report: Reporter) -> None:
        super().__init__(logging.INFO)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report.line(record.getMessage())


@contextmanager
def log_shown(report: Reporter) -> Iterator[None]:
    """Show what the library logs, such as a schedule's decisions, during a block."""
    logger, handler = logging.getLogger("loraover"), _ToReporter(report)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
