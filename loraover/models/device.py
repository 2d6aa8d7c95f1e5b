"""Devices that a model can be run on, the processor, an NVIDIA GPU, or an Apple GPU, their memory, and data types."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from loraover.common.errors import ConfigError
from loraover.common.later import torch
from loraover.common.request import as_written

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Data types that weights are stored in."""

COMPUTE_DTYPES = {**DTYPES, "fp64": "float64"}
"""Data types that a model can be run in."""

DEVICES = ("auto", "cpu", "cuda", "mps")
"""Names of devices; "auto" is the first available one of cuda, mps and cpu."""

WITHOUT_FLOAT64 = ("mps",)
"""Devices for which the CPU does the work in float64."""


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of a name: one of `DEVICES`, or one GPU of several, such as "cuda:1"."""
    found = found_devices()
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if found.get(kind)))
    kind, _, index = name.partition(":")
    if name not in DEVICES and not is_one_gpu(name):
        raise ConfigError(f"device is {name!r}, expected one of {', '.join(DEVICES)}, or one GPU such as cuda:1.")
    if int(index or 0) >= found[kind]:
        names = [kind if count == 1 else f"{count} of {kind}" for kind, count in found.items() if count]
        listed = f"{names[0]} only" if len(names) == 1 else ", ".join(names)
        raise ConfigError(
            f"device: there is no {name} here; PyTorch {torch.__version__} finds {listed}. Choose a device that is "
            "there, or auto. If the machine has a GPU, install a PyTorch that is built for it."
        )
    return torch.device(name)


def is_one_gpu(name: str) -> bool:
    """Whether a name is that of one GPU of several, such as "cuda:1", as PyTorch reads it."""
    return re.fullmatch(r"cuda:(0|[1-9][0-9]{0,2})", name) is not None


def choose_compute(device: str, compute_dtype: str) -> tuple[torch.device, torch.dtype]:
    """Return the device and the data type to run a model in."""
    name = as_written("compute_dtype")
    if compute_dtype not in COMPUTE_DTYPES:
        raise ConfigError(f"{name} is {compute_dtype!r}, expected one of {', '.join(COMPUTE_DTYPES)}.")
    place = choose_device(device)
    if place.type == "mps" and compute_dtype == "fp64":
        remedy = f"add {as_written('device', 'cpu')}, or choose another type"
        raise ConfigError(f"{name}: an Apple GPU (mps) has no fp64; {remedy}.")
    return place, getattr(torch, COMPUTE_DTYPES[compute_dtype])


def found_devices() -> dict[str, int]:
    """Return the number of devices of each kind that PyTorch finds: cpu, cuda and mps."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"cpu": 1, "cuda": gpus, "mps": int(torch.backends.mps.is_available())}


def prefers_bf16(device: torch.device) -> bool:
    """Whether a device has instructions that make a step in bfloat16 faster than one in float32.

    Of x86 CPUs, these are the ones with AMX. Forward and backward of six layers of SmolLM2's shape take 0.6 of the time
    there; 1.7 times as long with the instructions of AVX-512 for bfloat16 alone, 4 times as long with AVX-512 without
    them, and over 30 times as long with AVX2 (PyTorch 2.13, oneDNN limited by ONEDNN_MAX_CPU_ISA on one CPU). Others
    were not measured.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())  # PyTorch 2.6 has no public function


def total_memory(device: str) -> int | None:
    """Return the memory of a device in bytes, or what a container or a job may use of it; None if unknown.

    A device is "cpu", "cuda" (the first GPU), "cuda:1" or "mps".
    """
    kind, _, index = device.partition(":")
    if kind == "cuda":
        return torch.cuda.get_device_properties(int(index or 0)).total_memory
    if kind == "mps":
        return torch.mps.recommended_max_memory()
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return min([machine, *(limit.total for limit in memory_limits())])
    except (ValueError, OSError):
        return None


def free_memory(device: str) -> int | None:
    """Return the memory of a device that this process can still take, in bytes; None if unknown."""
    kind, _, index = device.partition(":")
    if kind == "cuda":
        return torch.cuda.mem_get_info(int(index or 0))[0]
    if kind == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return min([1024 * int(lines["MemAvailable"].split()[0]), *(limit.free for limit in memory_limits())])
    except (OSError, LookupError, ValueError):
        return None


class Allowance(NamedTuple):
    """Bytes that a control group may use: its limit, and what is left if pages of read files are given back."""

    total: int
    free: int


def memory_limits(root: Path = Path("/")) -> list[Allowance]:
    """Return the allowance of this process's control group and of each above it, as far as they have a limit.

    A container sees its own group as the uppermost one, at the place of the machine's. In version 1, it may be named by
    a path that exists outside of the container only (Linux 6.12, admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst).
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, limits, reclaimable = root / "sys/fs/cgroup", ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            mount, reclaimable = root / "sys/fs/cgroup/memory", "total_inactive_file"
            limits = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            group = mount.joinpath(*parts[:depth])
            with suppress(OSError, ValueError, KeyError):  # it has no limit, or none that this process sees
                total, used = (int((group / name).read_text()) for name in limits)
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                found.append(Allowance(total, max(0, total - used + int(statistics[reclaimable]))))
    return found
