"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """Receiver of progress; this one shows nothing, which is what a library should do unless it is asked."""

    @property
    def shows_bars(self) -> bool:
        """Whether progress bars of other libraries may be shown too."""
        return False

    def line(self, text: str) -> None:
        """Take one line of text about what is being done."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Follow one piece of work; the block calls the function that it gets with the amount done so far."""
        yield lambda done: None


class ConsoleReporter(Reporter):
    """Shows lines and progress bars on a console; where the console is not a terminal, plain lines only.

    Args:
        console: where to print; standard error if absent.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = Console(stderr=True) if console is None else console

    @property
    def shows_bars(self) -> bool:
        return self.console.is_terminal

    def line(self, text: str) -> None:
        self.console.print(escape(text), soft_wrap=True, highlight=False)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        if not self.console.is_terminal:
            self.line(f"{label}: {total}")
            yield lambda done: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(escape(label), total=total)
            yield lambda done: progress.update(task, completed=done)


SILENT = Reporter()


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
