"""Circumstances of a measurement: versions, hardware and memory."""

from __future__ import annotations

import platform
import resource
import sys
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from loraover.common.later import has_torch
from loraover.common.threads import usual_threads
from loraover.common.version import __version__


def environment(*others: str) -> dict[str, str]:
    """Return the versions of Python and of the packages that measurements depend on, and of some others.

    What is not installed is left out: an engine's environment has no PEFT, and a base installation no PyTorch.
    """
    packages = {}
    for name in ("torch", "transformers", "safetensors", *others, "peft"):
        with suppress(PackageNotFoundError):
            packages[name] = _version(name)
    return {"loraover": __version__, "python": platform.python_version(), **packages}


_version = cache(version)  # which parses the whole description of a package


def hardware() -> str:
    """Describe the processor, and the accelerator if there is one, in one line."""
    if not has_torch():
        return hardware_of_numpy()
    import torch

    machine = f"{platform.machine()} {platform.system()}"

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{machine}, {torch.get_num_threads()} threads{gpu}"


def hardware_used() -> str:
    """Describe what has calculated in this process: the processor alone where PyTorch was not loaded."""
    return hardware() if "torch" in sys.modules else hardware_of_numpy()


def hardware_of_numpy() -> str:
    """Describe the processor in one line, as `hardware` does."""
    threads = usual_threads()
    return f"{platform.machine()} {platform.system()}, NumPy on {threads} thread{'s' * (threads != 1)}"


def today() -> str:
    """Return the day in UTC, such as "2026-03-01"."""
    return datetime.now(UTC).date().isoformat()


def processor() -> str:
    """Return the name of the processor, as Linux records it in a file; elsewhere as Python reports it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown processor")


def peak_bytes() -> int:
    """Return the largest memory so far, in bytes: PyTorch's on the CUDA device, or this process's if there is none."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else host_peak_bytes()


def host_peak_bytes() -> int:
    """Return the largest memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also counts the parent's memory before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
