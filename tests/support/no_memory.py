"""Failed allocations, as a GPU, PyTorch's allocator for the CPU and Python report them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NO_MEMORY: dict[str, Exception] = {
    "a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
    "the CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you"),
    "Python": MemoryError(),
}


def failing(name: str) -> Callable[..., Any]:
    """Return a function that fails to allocate memory."""

    def fail(*_: Any, **__: Any) -> Any:
        raise NO_MEMORY[name]

    return fail
