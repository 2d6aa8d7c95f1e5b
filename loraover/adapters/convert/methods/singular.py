"""Parts of the base weight's singular value decomposition, which PEFT computes in float32 when it loads an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from loraover.adapters.numerics.single_precision import part_error
from loraover.common.later import torch

if TYPE_CHECKING:
    from torch import Tensor


class SingularPart(NamedTuple):
    """Some singular triplets of a weight, in float32.

    Args:
        u: Left singular vectors, (out_features, k).
        s: Singular values, (k,).
        vt: Right singular vectors, (k, in_features).
        apart: Bound of the Frobenius norm by which u diag(s) vt may differ on another machine.
        cut: Number of singular values before the cut; the part has either these or all others.
        gap: Difference of the singular values on both sides of the cut, relative to the largest.
    """

    u: Tensor
    s: Tensor
    vt: Tensor
    apart: float
    cut: int
    gap: float

    @property
    def reason(self) -> str:
        """Why machines may find another part, in words."""
        return (
            f"the singular values {self.cut} and {self.cut + 1} of the base weight differ by {self.gap:.1e} of the "
            "largest"
        )


def singular_part(weight: Tensor, cut: int, *, tail: bool = False) -> SingularPart:
    """Return the first `cut` singular triplets of a float32 matrix as PEFT finds them, or with `tail` the others."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    kept = slice(cut, None) if tail else slice(cut)
    m, n = weight.shape
    gap = float((s[cut - 1] - s[cut]) / s[0]) if 0 < cut < len(s) else 1.0
    return SingularPart(u[:, kept], s[kept], vt[kept], part_error(s, (m, n), cut, tail=tail), cut, gap)
