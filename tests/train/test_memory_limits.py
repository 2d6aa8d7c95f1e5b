"""The memory that a container or a job leaves to this process."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest

from loraover.models import device
from loraover.models.device import Allowance, free_memory, memory_limits, total_memory

V2 = ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
UNLIMITED = 2**63 - 4096  # as version 1 writes it

Groups = Mapping[str, tuple[int | str, int, int]]
"""Limit, usage and inactive pages of files of each control group that this process sees, by its path."""


def make_root(folder: Path, named: str, kind: tuple[str, str, str, str], groups: Groups) -> Path:
    """Root of a file system whose /proc/self/cgroup holds `named`."""
    mount, limit, usage, reclaimable = kind
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(named)
    for path, (total, used, inactive) in groups.items():
        group = folder / mount / path
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(f"{total}\n")
        (group / usage).write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 5\n{reclaimable} {inactive}\n")
    return folder


SLURM = "1:name=systemd:/\n4:memory:/slurm/job_1\n0::/\n"
CASES: dict[str, tuple[str, tuple[str, str, str, str], Groups, list[Allowance]]] = {
    "a container": ("0::/\n", V2, {"": (900, 700, 50)}, [Allowance(900, 250)]),
    "a job without a limit in one with": (
        "0::/user.slice/job:1\n",
        V2,
        {"user.slice/job:1": ("max", 10, 0), "user.slice": (500, 100, 0)},
        [Allowance(500, 400)],
    ),
    "both have a limit": (
        "0::/a/b\n",
        V2,
        {"a/b": (300, 10, 0), "a": (400, 390, 0)},
        [Allowance(300, 290), Allowance(400, 10)],
    ),
    "above the limit": ("0::/a\n", V2, {"a": (300, 310, 0)}, [Allowance(300, 0)]),
    "a job, version 1": (
        SLURM,
        V1,
        {"slurm/job_1": (600, 500, 30), "": (UNLIMITED, 900, 0)},
        [Allowance(600, 130), Allowance(UNLIMITED, UNLIMITED - 900)],
    ),
    "a container, version 1": ("7:cpu,memory:/docker/4fe1\n", V1, {"": (600, 100, 0)}, [Allowance(600, 500)]),
    "no control groups of memory": ("3:cpuset:/\n0::/a\n", V2, {}, []),
}


@pytest.mark.parametrize("case", CASES)
def test_each_limit_is_read(case: str, tmp_path: Path) -> None:
    named, kind, groups, expected = CASES[case]
    assert list(memory_limits(make_root(tmp_path, named, kind, groups))) == expected


def test_where_no_group_has_a_limit_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "memory_limits", partial(memory_limits, tmp_path))
    of_the_machine = total_memory("cpu")
    make_root(tmp_path, SLURM, V1, {"slurm/job_1": (UNLIMITED, 500, 0)})
    assert total_memory("cpu") == of_the_machine


def test_the_memory_of_a_job_is_what_it_is_limited_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_root(tmp_path, SLURM, V1, {"slurm/job_1": (2**26, 2**20, 0)})
    monkeypatch.setattr(device, "memory_limits", partial(memory_limits, root))
    assert (total_memory("cpu"), free_memory("cpu")) == (2**26, 2**26 - 2**20)
