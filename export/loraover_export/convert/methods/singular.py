"""Parts of the base weight's singular value decomposition, which PEFT computes in float32 when it loads an adapter."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loraover_export.convert.source import Module
from loraover_export.numerics.single_precision import part_error, smallest_gap

MERGE_THERE = "Merge it into the base model with PEFT's merge_and_unload, where it was trained."


class Part(NamedTuple):
    """Some singular triplets of a weight, in float32.

    Args:
        u: left singular vectors, (out_features, k).
        s: singular values, (k,).
        vt: right singular vectors, (k, in_features).
        apart: bound of the Frobenius norm by which u diag(s) vt may differ on another machine.
    """

    u: Tensor
    s: Tensor
    vt: Tensor
    apart: float


def singular_part(module: Module[Any], weight: Tensor, cut: int, *, tail: bool = False) -> Part:
    """Return the first `cut` singular triplets of a float32 matrix as PEFT finds them, or with `tail` the others.

    Raises:
        ExportError: the singular values at the cut are so close that another machine would find another part.
    """
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    apart = part_error(s, cut, tail=tail)
    if not math.isfinite(apart):
        gap = float(s[cut - 1] - s[cut]) / float(s[0])
        raise module.refuse(
            f"the singular values {cut} and {cut + 1} of the base weight differ by {gap:.1e} of the largest, and need "
            f"{smallest_gap(len(s)):.1e}, so the part that the adapter was started from depends on the machine. "
            f"{MERGE_THERE}"
        )
    kept = slice(cut, None) if tail else slice(cut)
    return Part(u[:, kept], s[kept], vt[kept], apart)
