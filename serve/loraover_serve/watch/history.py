"""The history of checks, in SQLite."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from loraover.common.errors import OutputError

SCHEMA_VERSION = 2
DAY_S = 86_400.0


@dataclass(frozen=True)
class Check:
    """Check in a watch's history.

    Args:
        server: Name of the server.
        adapter: Name of the adapter.
        at: End of the check, in seconds since 1970.
        verdict: "as trained", "differs", "inconclusive" or "failed".
        fault: The likely fault; None if none explains the answers.
        reason: Reason for the verdict, in words.
        distance: RMS distance from PyTorch, in nats; None after a failure.
        allowed: Largest distance that noise explains, in nats.
        strength: Strength of the adapter, 1 as trained.
        seconds: Seconds that the check took.
        requests: Number of requests that it sent.
        caches: Verdict on the server's cache of keys and values, or the fault; None if it was not asked.
        changed: Whether the verdict or the fault is new.
    """

    server: str
    adapter: str
    at: float
    verdict: str
    fault: str | None
    reason: str
    distance: float | None
    allowed: float | None
    strength: float | None
    seconds: float
    requests: int
    caches: str | None = None
    changed: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """Names of server and adapter."""
        return self.server, self.adapter

    @property
    def shown(self) -> tuple[str, str | None]:
        """Verdict and fault. A check with a new verdict or a new fault counts as a change."""
        return self.verdict, self.fault


NAMES = [one.name for one in fields(Check)]
TYPES = {"at": "REAL", "distance": "REAL", "allowed": "REAL", "strength": "REAL", "seconds": "REAL"} | {
    "requests": "INTEGER",
    "changed": "INTEGER",
}
COLUMNS = ", ".join(NAMES)


class History:
    """Checks in a file, in the order in which they were added; several threads may use it.

    If the clock was set back, the order of their times differs.

    Args:
        path: The file, which is made if it is missing.
        wait_s: Longest wait for another program that writes the file, such as a backup, in seconds.

    Raises:
        OutputError: A file that cannot be written, or that is not a history; each method may raise it, too.
    """

    def __init__(self, path: Path, wait_s: float = 60.0) -> None:
        self._lock, self._path = threading.Lock(), path
        with self._named():
            self._connection = sqlite3.connect(path, wait_s, check_same_thread=False)
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in range(SCHEMA_VERSION + 1):
                raise OutputError(f"{path}: a history of version {version}, not {SCHEMA_VERSION}; name another file.")
            self._connection.execute("PRAGMA journal_mode = WAL")  # whole after a kill at any moment
        with self._used() as connection:
            columns = ", ".join(f"{name} {TYPES.get(name, 'TEXT')}" for name in NAMES)
            connection.execute(f"CREATE TABLE IF NOT EXISTS checks ({columns})")
            if version == 1:
                connection.execute("ALTER TABLE checks ADD COLUMN caches TEXT")
            connection.execute("CREATE INDEX IF NOT EXISTS of_adapter ON checks (server, adapter, at)")
            connection.execute("CREATE INDEX IF NOT EXISTS in_order ON checks (server, adapter)")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn SQLite's errors into errors that name the file."""
        try:
            yield
        except sqlite3.Error as error:
            raise OutputError(
                f"{self._path}: cannot be used as a history: {error}; see whether the disk has room and whether "
                "another program holds the file, or name another file."
            ) from error

    @contextmanager
    def _used(self) -> Iterator[sqlite3.Connection]:
        """The connection, locked for this thread; everything that the block writes is one transaction."""
        with self._named(), self._lock, self._connection:
            yield self._connection

    def add(self, check: Check) -> None:
        """Keep a check."""
        marks = ", ".join("?" * len(NAMES))
        with self._used() as connection:
            connection.execute(f"INSERT INTO checks ({COLUMNS}) VALUES ({marks})", astuple(check))

    def last(self, key: tuple[str, str]) -> Check | None:
        """The last check of an adapter on a server; None if there is none."""
        found = self._read("WHERE server = ? AND adapter = ? ORDER BY rowid DESC LIMIT 1", key)
        return found[0] if found else None

    def last_change(self, key: tuple[str, str]) -> Check | None:
        """The last check whose verdict or fault differed from the one before."""
        found = self._read("WHERE server = ? AND adapter = ? AND changed ORDER BY rowid DESC LIMIT 1", key)
        return found[0] if found else None

    def last_of_caches(self, key: tuple[str, str]) -> tuple[Check | None, int]:
        """The last check of an adapter that asked the server's cache, if one did, and the number of later checks."""
        mine = "WHERE server = ? AND adapter = ?"
        found = self._read(f"{mine} AND caches IS NOT NULL ORDER BY rowid DESC LIMIT 1", key)
        asked = f"SELECT max(rowid) FROM checks {mine} AND caches IS NOT NULL"
        with self._used() as connection:
            later = connection.execute(f"SELECT count(*) FROM checks {mine} AND rowid > ({asked})", (*key, *key))
            return (found[0] if found else None), int(later.fetchone()[0])

    def since(self, key: tuple[str, str], at: float, most: int) -> list[Check]:
        """The last checks of an adapter on a server since a time, the oldest first.

        Args:
            key: Names of server and adapter.
            at: The time.
            most: Largest number of checks.
        """
        found = self._read("WHERE server = ? AND adapter = ? AND at >= ? ORDER BY rowid DESC LIMIT ?", (*key, at, most))
        return found[::-1]

    def requests_since(self, at: float) -> list[tuple[float, int]]:
        """Time and number of requests of each check since a time, the oldest first."""
        asked = "SELECT at, requests FROM checks WHERE at > ? ORDER BY at"
        with self._used() as connection:
            return connection.execute(asked, (at,)).fetchall()

    def forget_before(self, at: float) -> None:
        """Remove the checks before a time, except the last change of each adapter."""
        changes = "SELECT max(rowid) FROM checks WHERE changed GROUP BY server, adapter"
        with self._used() as connection:
            connection.execute(f"DELETE FROM checks WHERE at < ? AND rowid NOT IN ({changes})", (at,))

    def close(self) -> None:
        """Close the file, after a write that another thread has begun."""
        with self._lock:
            self._connection.close()

    def _read(self, where: str, values: Sequence[object]) -> list[Check]:
        with self._used() as connection:
            rows = connection.execute(f"SELECT {COLUMNS} FROM checks {where}", values).fetchall()
        return [Check(**(dict(zip(NAMES, row, strict=True)) | {"changed": bool(row[-1])})) for row in rows]
