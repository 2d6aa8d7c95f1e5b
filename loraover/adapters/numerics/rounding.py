"""Correct rounding of float64 to the data types that adapters are stored in."""

from __future__ import annotations

import torch
from torch import Tensor

from loraover.checkpoint.tensor_file import is_finite
from loraover.common.errors import FoldError

STORAGE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def round_nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round each element to the nearest number of `dtype`, ties to even.

    PyTorch converts float64 to bfloat16 and float16 through float32, and so rounds twice. Rounding to odd at the first
    step makes the result of the second correct.

    Source: Boldo and Melquiond 2008, doi:10.1109/TC.2007.70819.

    Raises:
        FoldError: An element beyond the type's largest number.
    """
    is_direct = x.dtype != torch.float64 or dtype in (torch.float32, torch.float64)
    rounded = (x if is_direct else _round_to_odd(x)).to(dtype, copy=True)
    if not is_finite(rounded):
        if bool(torch.isnan(x).any()):
            raise FoldError("NaN among the elements; the training that made them had diverged.")
        raise FoldError(
            f"an element of {x.abs().max():.4g} exceeds the largest {str(dtype).removeprefix('torch.')} number, "
            f"{torch.finfo(dtype).max:.4g}; a wider type holds it."
        )
    return rounded


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


def _round_to_odd(x: Tensor) -> Tensor:
    """Round to float32 towards zero, and set the last bit where that was inexact."""
    nearest = x.to(torch.float32)
    wide = nearest.double()
    bits = nearest.view(torch.int32)
    inexact = wide != x
    bits.sub_((wide.abs_() > x.abs()).to(torch.int32)).bitwise_or_(inexact)
    return nearest


def round_tensor(key: str, exact: Tensor, dtype: str) -> Tensor:
    """Round a tensor to the nearest numbers of `dtype`; integers stay unchanged.

    Args:
        key: Name of the tensor, for the message.
        exact: The tensor, in float64 or float32 unless it holds integers.
        dtype: Data type to store: fp32, bf16 or fp16.

    Raises:
        FoldError: An element beyond the range of `dtype`.
    """
    if not exact.is_floating_point() or exact.dtype == STORAGE_DTYPES[dtype]:
        return exact.contiguous()
    try:
        return round_nearest(exact, STORAGE_DTYPES[dtype]).contiguous()
    except FoldError as error:
        raise FoldError(f"{key}: {error}") from error
