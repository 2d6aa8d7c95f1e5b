"""The device that a model is loaded to, and the memory that a container or a job leaves to this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loraover.common.errors import ConfigError
from loraover.models.device import Allowance, choose_device, found_devices, free_memory, memory_limits, total_memory
from loraover.models.load import load_model, resolve_model

from support.devices import ALL_DEVICES
from support.machine import with_devices, with_memory
from support.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("found", "name", "expected"),
    [
        ({}, "auto", "cpu"),
        ({"mps": True}, "auto", "mps"),
        ({"cuda": 1, "mps": True}, "auto", "cuda"),
        ({"cuda": 2}, "cuda", "cuda"),
        ({"cuda": 2}, "cuda:1", "cuda:1"),
        ({"cuda": 2}, "cpu", "cpu"),
    ],
)
def test_a_device_that_is_there_is_chosen(
    found: dict[str, Any], name: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_devices(monkeypatch, **found)
    assert choose_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("found", "name", "finds"),
    [
        ({}, "cuda", "finds cpu only"),
        ({}, "mps", "finds cpu only"),
        ({"mps": True}, "cuda:0", "finds cpu, mps"),
        ({"cuda": 2}, "cuda:2", "finds cpu, 2 of cuda"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(
    found: dict[str, Any], name: str, finds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_devices(monkeypatch, **found)
    with pytest.raises(ConfigError, match=f"there is no {name} here.*{finds}.*or auto"):
        choose_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:-1", "cuda:²", "cuda:01", "cpu:0", "mps:0", "meta"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected one of auto, cpu, cuda, mps, or one GPU such as cuda:1"):
        choose_device(name)


@pytest.mark.parametrize("device", ALL_DEVICES)
def test_a_model_is_loaded_to_the_device(device: str, model: Path) -> None:
    source = resolve_model(str(model))
    loaded = load_model(source, device=device)
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {device}
    assert loaded(input_ids=torch.arange(4, device=device)[None]).logits.device.type == device


def test_a_model_goes_straight_to_its_device(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    given: dict[str, Any] = {}

    def note(*args: Any, **kwargs: Any) -> torch.nn.Module:
        given.update(kwargs)
        return torch.nn.Identity()

    with_devices(monkeypatch, cuda=2)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", note)
    load_model(resolve_model(str(model)), device="cuda:1", dtype="fp64")
    assert given["device_map"] == {"": torch.device("cuda:1")}
    assert given["dtype"] is torch.float64


def test_this_machine_has_a_processor() -> None:
    assert found_devices()["cpu"] == 1


# Memory


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
    with_memory(monkeypatch, [])
    of_the_machine = total_memory("cpu")
    with_memory(monkeypatch, memory_limits(make_root(tmp_path, SLURM, V1, {"slurm/job_1": (UNLIMITED, 500, 0)})))
    assert total_memory("cpu") == of_the_machine


def test_the_memory_of_a_job_is_what_it_is_limited_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, memory_limits(make_root(tmp_path, SLURM, V1, {"slurm/job_1": (2**26, 2**20, 0)})))
    assert (total_memory("cpu"), free_memory("cpu")) == (2**26, 2**26 - 2**20)
