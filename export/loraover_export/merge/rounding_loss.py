"""Share of the adapter that is left where a merged weight is stored in its data type, or by a 4-bit quantiser.

A number of the storage type stands for all numbers near it. Where delta_W is smaller than half their spacing, W +
delta_W is stored as W, and that part of the adapter is lost.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from loraover.adapters.numerics.delta import Delta
from loraover.common.strict_json import StrictModel
from loraover_export.merge.arithmetic import WeightPart

ROWS = 256
"""Rows of each weight on which the quantiser is tried, evenly spaced."""

BLOCKSIZE = 64
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 numbers of the 4-bit NormalFloat. Source: Dettmers et al. 2023, arXiv:2305.14314, appendix E."""


class RoundingLoss(StrictModel):
    """Effect of storage on the deltas of one or more weights."""

    erased: float = Field(
        description="Share of the delta's squared norm in elements that are stored as they were in the base model"
    )
    error: float = Field(
        description="Norm of the change that storage makes to the delta, over the norm of the delta; 1 means that the "
        "error is as large as the delta"
    )


class Lost:
    """Sums of squares from which an `RoundingLoss` is made, over one or more weights."""

    def __init__(self) -> None:
        self.squares = self.erased = self.errors = 0.0

    def add(self, other: Lost) -> None:
        """Add the sums of another weight."""
        self.squares += other.squares
        self.erased += other.erased
        self.errors += other.errors

    def result(self) -> RoundingLoss:
        """Return the shares; 0 for a delta of zero."""
        squares = self.squares or 1.0
        return RoundingLoss(erased=self.erased / squares, error=math.sqrt(self.errors / squares))


def lost_by_rounding(parts: list[WeightPart]) -> Lost:
    """Return what one rounding of W + delta_W lost; W is a number of the storage type, so all of it is delta_W's."""
    lost = Lost()
    for part in parts:
        lost.squares += part.squares
        lost.erased += part.erased
        lost.errors += part.errors.error**2
    return lost


@torch.no_grad()
def lost_by_four_bits(weight: Tensor, delta: Delta) -> Lost:
    """Return what quantising W + delta_W instead of W leaves of delta_W: Q(W + delta_W) - Q(W) is compared with it.

    Q is the 4-bit NormalFloat with one scale, the largest absolute value, for each 64 elements of a row, as in
    bitsandbytes. It is tried on at most ROWS rows, and their sums are scaled to all rows.

    Args:
        weight: W before the merge, (out_features, in_features).
        delta: Its delta.
    """
    rows = slice(0, None, math.ceil(len(weight) / ROWS))
    before, change = weight[rows].double(), delta.rows(rows).product().value
    old, new = four_bits(before), four_bits(before + change)
    each = len(weight) / len(before)  # rows of the weight that each of these rows stands for
    lost = Lost()
    lost.squares = each * float(change.square().sum())
    lost.erased = each * float(change[new == old].square().sum())
    lost.errors = each * float((new - old - change).square().sum())
    return lost


def four_bits(weight: Tensor) -> Tensor:
    """Round each element to the nearest of 16 numbers times the largest absolute value of its block of a row."""
    m, n = weight.shape
    blocks = pad(weight, (0, -n % BLOCKSIZE)).view(m, -1, BLOCKSIZE)
    scales = blocks.abs().amax(-1, keepdim=True)
    shares = blocks / scales.clamp_min(torch.finfo(weight.dtype).tiny)
    levels = torch.tensor(NF4, dtype=weight.dtype)
    nearest = torch.bucketize(shares.contiguous(), (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scales).view(m, -1)[:, :n]
