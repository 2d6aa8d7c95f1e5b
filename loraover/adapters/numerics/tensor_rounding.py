"""Rounding of PyTorch's tensors, to nearest as adapters are written, and at random."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from loraover.adapters.numerics.rounding import STORAGE, round_array
from loraover.common.arrays import as_array, as_tensor

STORAGE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_ARRAYS = {torch.float64: np.dtype(np.float64)} | {dtype: STORAGE[name] for name, dtype in STORAGE_DTYPES.items()}


def round_nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a tensor on the CPU as `round_array` does."""
    return as_tensor(round_array(as_array(x), _ARRAYS[dtype]))


def round_randomly(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round each float64 element at random to one of the two numbers of `dtype` around it, the nearer more often.

    The error has no bias, and on average twice the variance of `round_nearest`'s.
    """
    nearest = round_nearest(x, dtype)
    error = x - nearest.double()
    towards = torch.where(error > 0, torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(nearest, towards)
    gap = (other.double() - nearest.double()).abs()
    chance = torch.where(gap > 0, error.abs() / gap.clamp_min(5e-324), 0.0)
    draw = torch.rand(x.shape, generator=generator, dtype=torch.float64)
    return torch.where(draw < chance, other, nearest)
