"""Parts of the base weight that PEFT computes in float32 whenever it loads an adapter, so that machines can differ.

Libraries round differently, and each computes the exact factors of some W + E. `docs/research/base-weight-bounds.md`
derives what E does to the part.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from loraover.adapters.convert.methods.base import LowRank
from loraover.adapters.convert.source import Module
from loraover.adapters.numerics.low_rank import product_norm
from loraover.checkpoint.error_bounds import U32
from loraover.common.later import torch

if TYPE_CHECKING:
    from torch import Tensor


SVD_ROUNDINGS = 20
"""Largest element of E in the singular vectors of W, in units of u32 sigma_1, as if another machine's W were W + E.

Roundings that are independent have no preferred direction (Higham and Mary 2019, doi:10.1137/18M1226312): each element
gets its share of the spectral norm, some sqrt(p) u32 sigma_1 where p is the smaller side. LAPACK's elements were 0.06
to 1.1 in root mean square, and parts of permuted matrices never farther apart than elements of 7 allow.
"""

CLOSE = 10
"""Distance within which singular values count as one group, in elements of E for each value in the group."""

QR_ROUNDINGS = 4
"""Largest element of E for the first r columns of a QR factorisation, in sqrt(r) u32 times the Frobenius norm."""


def part_error(s: Tensor, shape: tuple[int, int], cut: int, *, tail: bool = False) -> float:
    """Return a bound of the Frobenius norm of the difference between two machines' parts U_i S_i V_i^T of a matrix.

    The part has the first `cut` singular triplets, or with `tail` the others. The bound is the smallest sum, over all
    places c, of what the part of a cut at c may differ by, and of the triplets between c and `cut`, wherever they may
    turn. Where the singular values `s` (p,), the largest first, are not close at `cut`, c is `cut`.
    """
    values, longer = s.double(), max(shape)
    size = len(values)
    f = SVD_ROUNDINGS * U32 * float(values[0])
    best = math.inf
    for steps in range(size + 1):
        turned = []
        for place in {cut - steps, cut + steps} & set(range(size + 1)):
            between = values[min(place, cut) : max(place, cut)]
            turned.append(math.sqrt(2) * (float(between.norm()) + f * math.sqrt(longer * steps)))
            best = min(best, turned[-1] + _separated_part_error(values, longer, place, f, tail))
        if min(turned, default=math.inf) >= best:
            break
    return best


def _separated_part_error(values: Tensor, longer: int, cut: int, f: float, tail: bool) -> float:
    """Return the bound of a part that is cut at a gap; infinity where the elements f may close the gap."""
    part, others = (values[cut:], values[:cut]) if tail else (values[:cut], values[cut:])
    k, coupled = len(part), 0.0
    if len(part) and len(others) and f > 0:
        # E brings close values nearer by one element for each of them; twice that covers what is of second order.
        gaps = (part[:, None] - others).abs() - 2 * f * (_near(part, f)[:, None] + _near(others, f))
        if float(gaps.min()) <= 0:
            return math.inf
        coupled = float(((part[:, None] + f) / gaps).square().sum())
    return f * math.sqrt(k * k + k * (longer - len(values)) + 2 * coupled)


def _near(values: Tensor, f: float) -> Tensor:
    """Return for each value how many values, itself included, are closer to it than CLOSE elements f."""
    ascending, reach = values.sort().values, CLOSE * f
    upper = torch.searchsorted(ascending, values + reach, right=True)
    return upper - torch.searchsorted(ascending, values - reach)


def basis_error(upper: Tensor) -> float:
    """Return a bound of the Frobenius norm of the difference between two machines' orthonormal factors Q of a matrix.

    It is sqrt(2) e / (sigma_r - e) for the triangular factor `upper`, where e bounds the difference of the two W + E
    and sigma_r is the smallest singular value of W; infinity if sigma_r <= 4 e, since the columns are dependent then.
    """
    factor = upper.double()
    e = QR_ROUNDINGS * math.sqrt(len(factor)) * U32 * float(factor.norm())
    smallest = float(torch.linalg.svdvals(factor)[-1])
    return math.sqrt(2) * e / (smallest - e) if smallest > 4 * e else math.inf


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
        """Reason, in words, why another machine may find another part."""
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


MERGE_THERE = "Merge it into the base model with PEFT's merge_and_unload, where it was trained."

LARGEST_SHARE = 0.5
"""Largest bound that is accepted, relative to the norm of delta_W."""

NEGLIGIBLE = 2.0**-9
"""Bound that is accepted even where delta_W is smaller, relative to the norm of what PEFT starts from.

Rounding the weights to bfloat16 moves it by about as much. It keeps modules that training hardly moved.
"""


def determined(module: Module[Any], delta: LowRank, apart: float, size: float, reason: str) -> LowRank:
    """Return a delta_W, unless another machine's may be far from it."""
    norm = product_norm(delta.b, delta.a)
    if apart > NEGLIGIBLE * size and apart > LARGEST_SHARE * norm:
        raise module.refuse(
            f"{reason}. Another machine may therefore start the adapter from a part that differs by {apart:.2g}, which "
            f"is more than half of the norm of delta_W, {norm:.2g}. {MERGE_THERE}"
        )
    return delta


def orthonormal(module: Module[Any], name: str, columns: Tensor) -> tuple[Tensor, float]:
    """Return an orthonormal basis of a tensor's columns, and a bound of its distance from PEFT's in float32."""
    q, upper = torch.linalg.qr(columns)
    apart = basis_error(upper) if upper.shape[0] == upper.shape[1] else math.inf
    if not math.isfinite(apart):
        raise module.refuse(f"the columns of {name} are linearly dependent. {MERGE_THERE}")
    return q, apart
