"""Other machines than the one that runs the tests: their GPUs, processor, memory, file system and hub."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from loraover.models import device
from loraover.models.device import Allowance


def with_devices(patch: pytest.MonkeyPatch, cuda: int = 0, mps: bool = False, free: int = 0, total: int = 0) -> None:
    """PyTorch finds these devices; each NVIDIA GPU has so much memory, in bytes."""
    patch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    patch.setattr(torch.cuda, "device_count", lambda: cuda)
    patch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    patch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    patch.setattr(torch.cuda, "max_memory_allocated", lambda: total - free)
    patch.setattr(torch.backends.mps, "is_available", lambda: mps)


def with_cpu(patch: pytest.MonkeyPatch, has_amx: bool, capability: str = "AVX512") -> None:
    """A processor with these instructions, and no GPU."""
    with_devices(patch)
    patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)


def with_memory(patch: pytest.MonkeyPatch, allowed: Sequence[Allowance]) -> None:
    """The groups of this process have these limits of memory, and no others."""
    patch.setattr(device, "memory_limits", lambda: list(allowed))


def without_locks(patch: pytest.MonkeyPatch) -> None:
    """A file system that knows no locks, as some network shares."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    patch.setattr(fcntl, "flock", flock)


def without_links(patch: pytest.MonkeyPatch) -> None:
    """A file system that knows no hard links, as FAT."""

    def link(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    patch.setattr(os, "link", link)


def with_hub(patch: pytest.MonkeyPatch, **settings: Any) -> None:
    """The hub's library has these settings, which it takes from variables of its environment in a new process alone."""
    for name, value in settings.items():
        patch.setattr(f"huggingface_hub.constants.{name}", value)
