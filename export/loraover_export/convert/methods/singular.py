"""Parts of the base weight's singular value decomposition, which PEFT computes in float32 when it loads an adapter."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from loraover_export.convert.methods.base import LowRank
from loraover_export.convert.source import Module
from loraover_export.numerics.low_rank import product_norm
from loraover_export.numerics.single_precision import part_error

MERGE_THERE = "Merge it into the base model with PEFT's merge_and_unload, where it was trained."

LARGEST_SHARE = 0.5
"""Largest bound that is accepted, relative to the norm of delta_W."""

NEGLIGIBLE = 2.0**-9
"""Bound that is accepted even where delta_W is smaller, relative to the norm of the part.

Rounding the weights to bfloat16 moves the part by about as much. It keeps modules that training hardly moved.
"""


class Part(NamedTuple):
    """Some singular triplets of a weight, in float32.

    Args:
        u: left singular vectors, (out_features, k).
        s: singular values, (k,).
        vt: right singular vectors, (k, in_features).
        apart: bound of the Frobenius norm by which u diag(s) vt may differ on another machine.
        cut: number of singular values before the cut; the part has either these or all others.
        gap: difference of the singular values on both sides of the cut, relative to the largest.
    """

    u: Tensor
    s: Tensor
    vt: Tensor
    apart: float
    cut: int
    gap: float


def singular_part(weight: Tensor, cut: int, *, tail: bool = False) -> Part:
    """Return the first `cut` singular triplets of a float32 matrix as PEFT finds them, or with `tail` the others."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    kept = slice(cut, None) if tail else slice(cut)
    m, n = weight.shape
    gap = float((s[cut - 1] - s[cut]) / s[0]) if 0 < cut < len(s) else 1.0
    return Part(u[:, kept], s[kept], vt[kept], part_error(s, (m, n), cut, tail=tail), cut, gap)


def determined(module: Module[Any], part: Part, delta: LowRank) -> LowRank:
    """Return a delta_W that was started from a part, if enough of it is known without the machine that trained it.

    Raises:
        ExportError: another machine may find a part that differs by much of delta_W.
    """
    if part.apart > NEGLIGIBLE * float(part.s.norm()):
        norm = product_norm(delta.b, delta.a)
        if part.apart > LARGEST_SHARE * norm:
            raise module.refuse(
                f"the singular values {part.cut} and {part.cut + 1} of the base weight differ by {part.gap:.1e} of the "
                f"largest. Another machine may therefore start the adapter from a part that differs by "
                f"{part.apart:.2g}, which is more than half of the norm of delta_W, {norm:.2g}. {MERGE_THERE}"
            )
    return delta
