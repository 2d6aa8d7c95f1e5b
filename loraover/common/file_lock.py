"""A lock on a file, which one process holds at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors by which a file system says that it has no locks."""

_HELD: set[IO[Any]] = set()
"""Files of the locks that this process holds or waits for."""


def _let_go() -> None:
    """Close the files of a forked process, which may live for seconds after a parent that was killed."""
    while _HELD:
        _HELD.pop().close()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def hold_lock(path: Path, *, wait: bool) -> Iterator[int]:
    """Hold the lock of a file for a block; a file system without locks lets everyone in.

    The lock is released when the process ends, even if it is killed. A program that is started with the descriptor
    holds the lock, too; processes that are forked, such as PyTorch's loaders of data, do not.

    Args:
        path: The file, which is made if it is missing.
        wait: Whether to wait for another process that holds the lock.

    Yields:
        Descriptor of the locked file.

    Raises:
        BlockingIOError: Without `wait`, another process holds the lock.
        OSError: The file cannot be made.
    """
    with path.open("w") as file:
        _HELD.add(file)
        try:
            lock(file, wait=wait)
            yield file.fileno()
        finally:
            _HELD.discard(file)


def lock(file: IO[Any], *, wait: bool) -> None:
    """Take the lock of an open file, as `hold_lock` does; it is held until no process has the file open."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file; a file that is missing is not locked."""
    try:
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
