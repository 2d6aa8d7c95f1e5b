"""How far two machines' factorisations of one matrix W in float32 may be apart.

Some adapters start from a part of the base weight, which PEFT computes in float32 whenever it loads them. Libraries
round differently, and each computes the exact factors of some W + E. `docs/research/base-weight-bounds.md` derives
what E does to the part.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

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
"""Elements of E within which singular values move together, by as many elements as there are of them."""

QR_ROUNDINGS = 4
"""The same for the first r columns of a QR factorisation, in units of sqrt(r) u32 times the Frobenius norm."""


def part_error(s: Tensor, shape: tuple[int, int], cut: int, *, tail: bool = False) -> float:
    """Return a bound of the Frobenius norm of the difference between two machines' parts U_i S_i V_i^T of a matrix.

    The part has the first `cut` singular triplets, or the others. The bound is the smallest sum, over all places c, of
    what the part of a cut at c may differ by, and of the triplets between c and `cut`, wherever they may turn. Where
    the singular values at `cut` are not close, c is `cut`.

    Args:
        s: All singular values, (p,), the largest first.
        shape: Shape of the matrix, whose smaller side is p.
        cut: Number of the first singular values.
        tail: Whether the part has the other triplets.
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
    """Return for each value how many are so close that the elements f between them add up, itself included."""
    ascending, reach = values.sort().values, CLOSE * f
    upper = torch.searchsorted(ascending, values + reach, right=True)
    return upper - torch.searchsorted(ascending, values - reach)


def basis_error(upper: Tensor) -> float:
    """Return a bound of the Frobenius norm of the difference between two machines' orthonormal factors Q of a matrix.

    The bound is sqrt(2) e / (sigma_r - e), where e is the Frobenius norm of the difference between the two W + E, and
    sigma_r the smallest singular value of W.

    Args:
        upper: Triangular factor R, (r, r).

    Returns:
        The bound; infinity if sigma_r <= 4 e, since the columns are dependent then.
    """
    factor = upper.double()
    e = QR_ROUNDINGS * math.sqrt(len(factor)) * U32 * float(factor.norm())
    smallest = float(torch.linalg.svdvals(factor)[-1])
    return math.sqrt(2) * e / (smallest - e) if smallest > 4 * e else math.inf
