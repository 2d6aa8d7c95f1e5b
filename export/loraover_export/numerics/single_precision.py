"""How far two machines' factorizations of one matrix W in float32 may be apart.

Some adapters start from a part of the base weight, which PEFT computes in float32 whenever it loads them. Libraries
round differently, and each computes the exact factors of some W + E. `docs/error-bounds.md` derives what E does to the
part.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loraover.checkpoint.error_bounds import unit_roundoff

U32 = unit_roundoff(torch.float32)

SVD_ROUNDINGS = 20
"""Distance of two machines' W + E in the spectral norm, in units of sqrt(p) u32 sigma_1, where p is the smaller side.

A Householder bidiagonalization has p reflections on each side, whose roundings add up like independent ones, to some
sqrt(2 p) u32, and the iterations about as much again (Higham and Mary 2019, doi:10.1137/18M1226312). LAPACK's residuals
and departures from orthogonality together were at most 7 sqrt(p) u32 for p from 32 to 1024; two machines may have 20.
"""

QR_ROUNDINGS = 4
"""The same for the first r columns of a QR factorization, in units of sqrt(r) u32 times the Frobenius norm."""


def part_error(s: Tensor, cut: int, *, tail: bool = False) -> float:
    """Return a bound of the Frobenius norm of the difference between two machines' parts U_i S_i V_i^T of a matrix.

    The part has the first `cut` singular triplets, or the others. With e the spectral norm of the difference between
    the two W + E, and t the nearest singular value on the other side of the cut, the bound is

        e sqrt(2 sum_i g_i^2),     g_i = max(1, (s_i + e) / (|s_i - t| - 2 e))

    Args:
        s: all singular values, (p,), the largest first.
        cut: number of the first singular values.
        tail: whether the part has the other triplets.

    Returns:
        The bound; infinity if |s_i - t| <= 4 e for some i, since no part is determined then.
    """
    values = s.double()
    part, others = (values[cut:], values[:cut]) if tail else (values[:cut], values[cut:])
    e = SVD_ROUNDINGS * math.sqrt(len(values)) * U32 * float(values[0])
    growth = torch.ones_like(part)
    if len(others) and e > 0:
        gaps = (part - (others[-1] if tail else others[0])).abs()
        if bool((gaps <= 4 * e).any()):
            return math.inf
        growth = ((part + e) / (gaps - 2 * e)).clamp_min(1)
    return math.sqrt(2) * e * float(growth.norm())


def smallest_gap(size: int) -> float:
    """Return the smallest gap between singular values, relative to the largest, from which `part_error` is finite.

    Args:
        size: number of singular values.
    """
    return 4 * SVD_ROUNDINGS * math.sqrt(size) * U32


def basis_error(upper: Tensor) -> float:
    """Return a bound of the Frobenius norm of the difference between two machines' orthonormal factors Q of a matrix.

    The bound is sqrt(2) e / (sigma_r - e), where e is the Frobenius norm of the difference between the two W + E, and
    sigma_r the smallest singular value of W.

    Args:
        upper: triangular factor R, (r, r).

    Returns:
        The bound; infinity if sigma_r <= 4 e, since the columns are dependent then.
    """
    factor = upper.double()
    e = QR_ROUNDINGS * math.sqrt(len(factor)) * U32 * float(factor.norm())
    smallest = float(torch.linalg.svdvals(factor)[-1])
    return math.sqrt(2) * e / (smallest - e) if smallest > 4 * e else math.inf
