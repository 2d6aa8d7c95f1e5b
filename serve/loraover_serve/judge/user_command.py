"""A shell command of the user that makes a server load adapters while it is asked."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO

from loraover.common.errors import EngineError, printable

SHOWN_BYTES, PATIENCE_S = 500, 5.0  # of what a command wrote last, and until one that is told to end is killed
POLL_S, CHUNK_BYTES = 0.02, 1 << 16


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
        self._words, self._option, self._hidden = words, option, hidden

    @property
    def shown(self) -> str:
        """The command without secrets."""
        return self._hidden(self._words)

    def run(self, ends: float = math.inf) -> float:
        """Run the command to its end, and return its seconds. Processes that it leaves running are not ended.

        Args:
            ends: Time on `time.monotonic`'s clock at which it is ended with all that it started.

        Raises:
            CommandError: It cannot be started, failed, or was ended; the message has what it wrote last.
        """
        start = time.monotonic()
        with self._started() as (process, written):
            while (code := process.poll()) is None and time.monotonic() < ends:
                time.sleep(POLL_S)
            if code == 0:
                return time.monotonic() - start
            _end(process)
            if code is None:
                wrote = self._wrote(written)
                raise CommandError(
                    f"{self._option}: the time for all requests was over before the command ended; {wrote}"
                )
            raise CommandError(self._failure(code, written))

    @contextmanager
    def beside(self) -> Iterator[Callable[[], str | None]]:
        """Run the command during a block; at the block's end, end the command with all that it started.

        Yields:
            A function that returns None while the command runs, and after that the words of its failure, which are
            empty if it has none.

        Raises:
            CommandError: It cannot be started.
        """
        with self._started() as (process, written):
            try:
                yield lambda: None if (code := process.poll()) is None else self._failure(code, written)
            finally:
                _end(process)

    @contextmanager
    def _started(self) -> Iterator[tuple[subprocess.Popen[bytes], _Written]]:
        """Start the command, and end it with all that it started if the block is interrupted, as by SIGTERM."""
        with _ended_by_sigterm():
            try:
                process = subprocess.Popen(
                    ["sh", "-c", self._words],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise CommandError(f"{self._option}: sh cannot be started: {error.strerror or error}.") from error
            assert process.stdout is not None
            try:
                yield process, _Written(process.stdout)
            except KeyboardInterrupt:
                _end(process)
                raise

    def _failure(self, code: int, written: _Written) -> str:
        if not code:
            return ""
        return f"{self._option}: the command ended with exit code {code}, expected 0; {self._wrote(written)}"

    def _wrote(self, written: _Written) -> str:
        return f"it wrote: {printable(self._hidden(written.last())) or 'nothing'}"


class _Written:
    """Output of a command, of which only the end is kept.

    Args:
        output: The stream that the command writes.
    """

    def __init__(self, output: IO[bytes]) -> None:
        self._last, self._output = b"", output
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def last(self) -> str:
        """The end of the output, as text; later output of a process that the command left running may be missing."""
        self._reader.join(POLL_S)
        return self._last.decode(errors="replace").strip()

    def _read(self) -> None:
        with self._output:
            while chunk := os.read(self._output.fileno(), CHUNK_BYTES):
                self._last = (self._last + chunk)[-SHOWN_BYTES:]


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt in the main thread, unless the signal is ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if is_main else signal.SIG_IGN
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if before != signal.SIG_IGN:
            signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it started, and kill the processes that do not end when asked to."""
    until = time.monotonic() + PATIENCE_S
    with suppress(ProcessLookupError, PermissionError):  # nothing is left of them
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < until:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(POLL_S)
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE_S)
