"""Devices that a run can have: which are there, their memory, and Apple's GPUs, which have no float64."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.optim import AdamW

from loraover import LoraOverConfig, OverParameterization, Probe
from loraover.callbacks.diagnostics import core_numbers
from loraover.callbacks.step_norm import factors, step_norm
from loraover.common.errors import ConfigError
from loraover.common.provenance import hardware, peak_bytes
from loraover.models.device import Allowance, choose_device, found_devices, free_memory, memory_limits, total_memory
from loraover.models.load import load_model, resolve_model
from loraover.overparam import sharding
from loraover.overparam.decompositions import DECOMPOSITIONS
from loraover.overparam.importance import SCORES, GradientScore

from support.apple import apple_gpu
from support.devices import ALL_DEVICES
from support.machine import with_devices, with_memory
from support.tiny_models import net_loss, tiny_llama, tiny_net, tiny_t5, trainable


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    tiny_llama().save_pretrained(folder)
    return folder


def test_models_that_threads_load_at_once_are_whole(tmp_path: Path) -> None:
    """transformers forgets for good how weights are tied if two of its loads overlap."""
    tiny_t5().save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        models = [*pool.map(lambda _: load_model(source, task_type="SEQ_2_SEQ_LM"), range(12))]
    models.append(load_model(source, task_type="SEQ_2_SEQ_LM"))
    assert not any(parameter.is_meta for model in models for parameter in model.parameters())


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


def test_a_gpu_is_named_and_its_memory_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, cuda=1, total=12345)
    assert hardware().endswith(" threads, some GPU")
    assert peak_bytes() == 12345


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child's peak begins with its parent's")
def test_the_memory_of_a_parent_is_not_its_childs() -> None:
    child = "from loraover.common.provenance import peak_bytes; print(peak_bytes())"
    code = (
        f"import subprocess, sys; x = bytearray(2**30); subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**30


@pytest.mark.parametrize("convert", [Tensor.double, lambda tensor: tensor.to(torch.float64)], ids=["double", "to"])
def test_the_stand_in_refuses_float64(convert: Any) -> None:
    with apple_gpu(model := tiny_net()):
        parameter = trainable(model)[0].detach()
        for tensor in (parameter, parameter + 1, torch.zeros(2, device=parameter.device), torch.zeros(2).to("mps")):
            assert tensor.device.type == "mps"
            with pytest.raises(TypeError, match="float64"):
                convert(tensor)
            assert convert(tensor.cpu()).device.type == "cpu"
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(2, dtype=torch.float64, device="mps")
        with pytest.raises(TypeError, match="float64"):
            parameter.to("cpu", torch.float64)


def trained(on_apple: bool, score: str, decomposition: str, schedule: str) -> dict[str, float]:
    """What a short run says of its cores, its scores and its change."""
    model = tiny_net()
    with apple_gpu(model) if on_apple else nullcontext():
        rounds = {"rounds": 1, "start": 0.5} if schedule == "dynamic" else {}
        config = LoraOverConfig.model_validate(
            {"decomposition": decomposition, "schedule": schedule, "score": score, "budget": {"sites": 2}} | rounds
        )
        probe = Probe(model, range(2), net_loss)
        optimizer = AdamW(trainable(model), lr=1e-2, foreach=False)
        over = OverParameterization(model, config, steps=4, probe=probe).attach(optimizer)
        before = factors(model)
        for step in range(4):
            optimizer.zero_grad()
            net_loss(model, step).backward()
            optimizer.step()
            if isinstance(over.schedule.score, GradientScore):
                over.schedule.score.load(over.schedule.score.state())
        over.finish()
        assert len(over.injected) == 2
        numbers = core_numbers(over) | {"step_norm": step_norm(before, factors(model))}
        return numbers | over.schedule.rounds[0].scores


@pytest.mark.parametrize("schedule", ["static", "dynamic"])
@pytest.mark.parametrize("score", SCORES)
def test_every_score_is_that_of_a_cpu(score: str, schedule: str) -> None:
    found, expected = (trained(on_apple, score, "mpo", schedule) for on_apple in (True, False))
    assert all(map(math.isfinite, expected.values()))
    assert found == pytest.approx(expected, rel=1e-6)  # sums of some steps in float32, which is all that there is


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_every_decomposition_trains_as_on_a_cpu(decomposition: str) -> None:
    found, expected = (trained(on_apple, "fisher", decomposition, "dynamic") for on_apple in (True, False))
    assert found == pytest.approx(expected, rel=1e-6)  # sums of some steps in float32, which is all that there is


def test_rank_zeros_numbers_pass_through_an_apple_gpu_unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [math.pi, -1e-300, 0.0]

    def broadcast(shared: Tensor, src: int) -> None:
        assert shared.device.type == "mps"

    monkeypatch.setattr(sharding, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "broadcast", broadcast)
    with apple_gpu(tiny_net()):
        assert sharding.of_rank_zero(numbers, torch.device("mps")) == numbers
