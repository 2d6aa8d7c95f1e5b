"""Progress on a console."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loraover.common.command_line import printable
from loraover.common.reporter import Reporter


class ConsoleReporter(Reporter):
    """Reporter that shows lines and progress bars on a console, or only lines if the console is not a terminal.

    Args:
        console: Console to print to; standard error if absent.

    Example:
        ```python
        loraover.train("recipe.yaml", output="runs/a", report=ConsoleReporter())
        ```
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = Console(stderr=True) if console is None else console

    @property
    def shows_bars(self) -> bool:
        return self.console.is_terminal

    def line(self, text: str) -> None:
        """Print one line.

        Args:
            text: The line; markup in it is not interpreted.
        """
        print_line(self.console, text)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a progress bar during the `with` block; on a console that is not a terminal, print the label once.

        Args:
            label: Name of the work.
            total: Amount of work, in units such as steps or files.

        Yields:
            A function to call with the amount done so far.
        """
        if not self.console.is_terminal:
            self.line(f"{label}: {total}")
            yield lambda done: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(escape(label), total=total)
            yield lambda done: progress.update(task, completed=done)


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print a text that may quote a file: of markup and control characters, only line breaks are interpreted.

    Args:
        console: Console to print to.
        text: The text, which is not wrapped.
        style: rich's name of a style for all of it.
    """
    shown = "\n".join(map(printable, text.split("\n")))
    console.print(shown, style=style, markup=False, highlight=False, soft_wrap=True)


class _ToReporter(logging.Handler):
    def __init__(self, report: Reporter) -> None:
        super().__init__(logging.INFO)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report.line(record.getMessage())


@contextmanager
def log_shown(report: Reporter) -> Iterator[None]:
    """Report what the library logs during a block, such as a schedule's decisions."""
    logger, handler = logging.getLogger("loraover"), _ToReporter(report)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
