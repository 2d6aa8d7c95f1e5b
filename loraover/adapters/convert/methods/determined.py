"""Bounds for adapters of which PEFT computes a part in float32 at each loading, so that machines can differ."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from loraover.adapters.convert.methods.base import LowRank
from loraover.adapters.convert.source import Module
from loraover.adapters.numerics.low_rank import product_norm
from loraover.adapters.numerics.single_precision import basis_error
from loraover.common.later import torch

if TYPE_CHECKING:
    from torch import Tensor

MERGE_THERE = "Merge it into the base model with PEFT's merge_and_unload, where it was trained."

LARGEST_SHARE = 0.5
"""Largest bound that is accepted, relative to the norm of delta_W."""

NEGLIGIBLE = 2.0**-9
"""Bound that is accepted even where delta_W is smaller, relative to the norm of what PEFT starts from.

Rounding the weights to bfloat16 moves it by about as much. It keeps modules that training hardly moved.
"""


def determined(module: Module[Any], delta: LowRank, apart: float, size: float, reason: str) -> LowRank:
    """Return a delta_W, unless it depends too much on the machine that trained it.

    Args:
        module: The module.
        delta: Its delta_W.
        apart: Bound of the Frobenius norm by which another machine's delta_W may differ.
        size: Frobenius norm of what PEFT starts from.
        reason: Why machines differ, in words, for the message.

    Raises:
        ExportError: Another machine's delta_W may differ by much.
    """
    norm = product_norm(delta.b, delta.a)
    if apart > NEGLIGIBLE * size and apart > LARGEST_SHARE * norm:
        raise module.refuse(
            f"{reason}. Another machine may therefore start the adapter from a part that differs by {apart:.2g}, which "
            f"is more than half of the norm of delta_W, {norm:.2g}. {MERGE_THERE}"
        )
    return delta


def orthonormal(module: Module[Any], name: str, columns: Tensor) -> tuple[Tensor, float]:
    """Return an orthonormal basis of a tensor's columns, and a bound of its distance from PEFT's in float32.

    Raises:
        ExportError: Columns that are linearly dependent in float32, or more of them than rows.
    """
    q, upper = torch.linalg.qr(columns)
    apart = basis_error(upper) if upper.shape[0] == upper.shape[1] else math.inf
    if not math.isfinite(apart):
        raise module.refuse(f"the columns of {name} are linearly dependent. {MERGE_THERE}")
    return q, apart
