"""Files that others write: whether an adapter's folder is complete, and prepared adapters that nobody may remove."""

from __future__ import annotations

import asyncio
import fcntl
import time
from pathlib import Path
from typing import IO

from loraover.checkpoint.files import CONFIG_FILE, CORES_FILE, META_FILE, REFERENCE_FILE, TEMPLATE_FILE, TENSORS_FILE
from loraover.common.file_lock import NO_LOCKS
from loraover_serve.plugin.settings import RefusedError

FILES = (CONFIG_FILE, TENSORS_FILE, META_FILE, CORES_FILE, TEMPLATE_FILE, REFERENCE_FILE)
"""Files of an adapter that what is prepared of it may depend on; others, such as logs, may change at any time."""

POLL_S = 0.5
"""Seconds between two looks at a folder that is being written."""

PATIENCE_S = 60.0
"""Seconds that a request waits for a folder that is being written."""

HOLDS = "held"
"""Folder of the cache with a file for each prepared adapter that a server may read, which the server locks."""

State = tuple[tuple[str, int, int, int, int, int], ...]
"""Marks that change when a file of an adapter is written or replaced: name, device, inode, bytes, times in ns."""


def state_of(folder: Path) -> State:
    """Return the state of an adapter's files; that of a folder without any is empty."""
    found = []
    for name in FILES:
        try:
            file = (folder / name).stat()
        except (OSError, ValueError):  # it is missing, is just replaced, or cannot have that name
            continue
        found.append((name, file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns))
    return tuple(found)


class Folders:
    """Since when the adapters' folders are unchanged.

    A folder that is half overwritten may hold a well-formed adapter, which nobody trained. Therefore it is read only
    when nothing has written there for some seconds.

    Args:
        settle_s: Seconds for which a folder has to be unchanged before it is read.
    """

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._seen: dict[Path, tuple[State, float]] = {}

    def settled(self, folder: Path) -> State | None:
        """Return the state of a folder that has been unchanged for long enough; None of any other.

        Of a folder that is seen for the first time, the files' own times are believed; later changes are timed here,
        since the clock of a file server may differ.
        """
        state, now = state_of(folder), time.monotonic()
        before, since = self._seen.get(folder, (None, now))
        if state != before:
            since = now if before is not None else now - _age_s(state)
            self._seen[folder] = state, since
        return state if now - since >= self._settle_s else None

    async def settle(self, folder: Path) -> State:
        """Wait until a folder has been unchanged for long enough, and return its state.

        Raises:
            RefusedError: Its files went on changing.
        """
        given_up = time.monotonic() + max(PATIENCE_S, 2 * self._settle_s)
        while (state := await asyncio.to_thread(self.settled, folder)) is None:
            if time.monotonic() > given_up:
                raise RefusedError(f"{folder}: its files are still being written; ask again when they are complete.")
            await asyncio.sleep(min(POLL_S, self._settle_s))
        return state


def _age_s(state: State) -> float:
    """Return the seconds since the last change of a state's files; 0 if their clock is ahead of ours."""
    newest = max((changed for *_, changed in state), default=0)  # a copy may keep the other time, of modification
    return max(0.0, time.time() - newest / 1e9)


class Holds:
    """Locks on the prepared adapters that this server may read, until it ends.

    vLLM reads an adapter again from its path if it was evicted, within a step of its engine, and a failure there ends
    the server. An earlier version may be read again, too, for a request that still runs.

    Args:
        cache: Folder of prepared adapters.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._files: dict[str, IO[bytes]] = {}

    def hold(self, digest: str) -> bool:
        """Lock a prepared adapter against removal, and return whether it is still there.

        Raises:
            OSError: The file of the lock cannot be made.
        """
        if digest not in self._files:
            (self._cache / HOLDS).mkdir(exist_ok=True)
            file = (self._cache / HOLDS / digest).open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_SH)  # waits for a removal that has begun
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    file.close()
                    raise
            self._files[digest] = file
        return (self._cache / digest).is_dir()
