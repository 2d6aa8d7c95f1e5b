"""Errors that say that memory could not be allocated."""

from __future__ import annotations

from loraover.common.errors import LoraOverError

PHRASES = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Words of PyTorch's RuntimeErrors. Nothing else distinguishes these errors from others."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that memory could not be allocated."""
    import torch

    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        is_torchs = isinstance(error, RuntimeError) and not isinstance(error, LoraOverError)
        if is_torchs and any(phrase in str(error) for phrase in PHRASES):
            return True
        error = error.__cause__
    return False
