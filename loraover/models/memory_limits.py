"""Memory that a container or a job may use: the limits that Linux's control groups set to this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Allowance(NamedTuple):
    """What a control group may use.

    Args:
        total: Its limit, in bytes.
        free: What is left of it if the pages of files that were not read again are given back, in bytes.
    """

    total: int
    free: int


def memory_limits(root: Path = Path("/")) -> Iterator[Allowance]:
    """Yield the allowance of this process's control group and of each above it, as far as they have a limit.

    A container sees its own group as the uppermost one, at the place of the machine's. In version 1, it may be named
    by a path that exists outside of the container only.

    Args:
        root: Root of the file system.

    Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of Linux 6.12.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            found = _allowance(mount.joinpath(*parts[:depth]), *names)
            if found is not None:
                yield found


def _allowance(group: Path, limit: str, usage: str, reclaimable: str) -> Allowance | None:
    """Return what a group may use; None if it has no limit, or none that this process sees."""
    try:
        total, used = (int((group / name).read_text()) for name in (limit, usage))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return Allowance(total, max(0, total - used + int(statistics[reclaimable])))
    except (OSError, ValueError, KeyError):
        return None
