"""PyTorch for modules that are also imported where it is not installed: it is imported when it is first used.

A base installation has no PyTorch; looking at adapters, and writing plain ones for vLLM, needs none.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(import_module("torch"), name)

    torch = _Torch()


def has_torch() -> bool:
    """Whether PyTorch and transformers are installed, which the extra `torch` brings."""
    return all(find_spec(name) is not None for name in ("torch", "transformers"))
