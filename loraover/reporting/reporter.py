"""Progress on a console."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from textwrap import wrap
from typing import TYPE_CHECKING

from loraover.common.errors import printable
from loraover.common.reporter import Reporter

if TYPE_CHECKING:
    from rich.console import Console


class ConsoleReporter(Reporter):
    """Reporter that shows lines and progress bars on a console, or only lines if the console is not a terminal.

    rich, which takes longer to import than some commands take to do their work, is imported for the first bar.

    Args:
        console: Console to print to; None means one of a standard stream.
        stderr: Whether that stream is standard error.

    Example:
        ```python
        import loraover

        loraover.train("demo", output="runs/demo", report=loraover.ConsoleReporter())
        ```
    """

    def __init__(self, console: Console | None = None, *, stderr: bool = True) -> None:
        self._stderr = stderr
        if console is not None:
            self.console = console

    @cached_property
    def console(self) -> Console:
        """The console."""
        from rich.console import Console

        return Console(stderr=self._stderr)

    @property
    def shows_bars(self) -> bool:
        return self.console.is_terminal

    def line(self, text: str) -> None:
        """Print one line; markup in it is not interpreted."""
        if "console" in vars(self):
            print_line(self.console, text)
        else:
            print(_shown(text), file=sys.stderr if self._stderr else sys.stdout, flush=True)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a progress bar during the `with` block; on a console that is not a terminal, print the label once."""
        if not self.console.is_terminal:
            self.line(f"{label}: {total}")
            yield lambda done: None
            return
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(escape(label), total=total)
            yield lambda done: progress.update(task, completed=done)


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print a text that may quote a file: of markup and control characters, only line breaks are interpreted.

    Its lines are not wrapped.
    """
    console.print(_shown(text), style=style, markup=False, highlight=False, soft_wrap=True)


def print_rows(console: Console, rows: Sequence[tuple[str, str]], *, wraps: bool = False) -> None:
    """Print names and values, which may quote a file, one below the other.

    A terminal's lines are broken between words; those of files and pipes only if it `wraps`.
    """
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        lines = (
            wrap(value, max(console.width - width, 20), break_on_hyphens=False)
            if console.is_terminal or wraps
            else [value]
        )
        print_line(console, f"{name:<{width}}" + f"\n{' ' * width}".join(lines))


def _shown(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


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
