"""A shell command of the user's, which makes a server load adapters while it is asked."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from loraover.common.errors import EngineError, printable

SHOWN_BYTES, PATIENCE_S = 500, 5.0  # of what a command wrote last, and until one that is told to end is killed


class CommandError(EngineError):
    """A command of the user's that cannot be started, or failed."""


class UserCommand:
    """A shell command of the user's.

    Args:
        words: The command, as `sh -c` takes it.
        option: Name of the option that has it, as its user writes it.
        hidden: Function that hides secrets in a text that is shown.
    """

    def __init__(self, words: str, option: str, hidden: Callable[[str], str] = str) -> None:
        self.words, self._option, self._hidden = words, option, hidden

    def run(self) -> float:
        """Run the command to its end, and return the seconds that it took.

        Raises:
            CommandError: It cannot be started, or failed; the message has what it wrote last.
        """
        start = time.monotonic()
        with self.beside() as failure:
            while (ended := failure()) is None:
                time.sleep(0.02)
            if ended:
                raise CommandError(ended)
        return time.monotonic() - start

    @contextmanager
    def beside(self) -> Iterator[Callable[[], str | None]]:
        """Run the command beside a block, at the end of which it is ended with all that it started.

        Yields:
            A function that returns None while the command runs, and after that the words of its failure, which are
            empty if it has none.

        Raises:
            CommandError: It cannot be started.
        """
        with tempfile.TemporaryFile() as output:
            try:
                process = subprocess.Popen(
                    ["sh", "-c", self.words],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            except OSError as error:
                raise CommandError(f"{self._option}: sh cannot be started: {error.strerror or error}.") from error
            try:
                yield lambda: self._failure(process.poll(), output)
            finally:
                _end(process)

    def _failure(self, code: int | None, output: IO[bytes]) -> str | None:
        if not code:
            return None if code is None else ""
        size = os.fstat(output.fileno()).st_size
        last = os.pread(output.fileno(), SHOWN_BYTES, max(0, size - SHOWN_BYTES)).decode(errors="replace").strip()
        shown = printable(self._hidden(last)) or "nothing"
        return f"{self._option}: the command ended with exit code {code}, expected 0; it wrote: {shown}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, with all that it started; what outlives a command by itself is left alone."""
    for kind in (signal.SIGTERM, signal.SIGKILL) if process.poll() is None else ():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
            return
