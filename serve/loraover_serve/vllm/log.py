"""The log of a vLLM server, which one server writes at a time."""

from __future__ import annotations

import os
import re
import stat
import time
from pathlib import Path
from typing import BinaryIO

from loraover.common.errors import OutputError
from loraover.common.file_lock import lock
from loraover.common.request import as_written

LOCK_S, POLL_S = 5.0, 0.5  # for the processes of a server that was stopped to let go of its log
LOG_LINES, LINE_SHOWN = 12, 300  # lines of the log, characters of each
_ERROR = re.compile(r"\w(Error|Exception): \S")


def open_log(log: Path) -> BinaryIO:
    """Open a server's log, which is emptied, and locked as long as a process of the server has it open.

    Args:
        log: The file; it may be /dev/null, which takes what any number of servers print.

    Raises:
        OutputError: A file that cannot be written, or that another server writes.
    """
    try:
        output = log.open("ab")
        if stat.S_ISREG(os.fstat(output.fileno()).st_mode):
            _lock(output)
            output.truncate(0)
        return output
    except OSError as error:
        reason = "another running server writes it" if isinstance(error, BlockingIOError) else error.strerror
        raise OutputError(
            f"{log}: the log cannot be written: {reason}; name another with {as_written('log')}."
        ) from error


def _lock(output: BinaryIO) -> None:
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            return lock(output, wait=False)
        except BlockingIOError:
            if time.monotonic() > deadline:
                output.close()
                raise
        time.sleep(POLL_S)


def end_of(log: Path) -> str:
    """The last lines of a log, after its first error: the lines that vLLM prints last seldom name the cause."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    first = next((line for line in lines if _ERROR.search(line) and "WARNING" not in line), None)
    end = [line for line in lines[-LOG_LINES:] if line.strip()]
    shown = end if first is None or first in end else [first, "...", *end]
    return "\n".join([f"the end of {log}:", *(line[-LINE_SHOWN:] for line in shown)])
