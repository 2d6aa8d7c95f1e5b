"""Bounds of rounding errors, from which certificates and checks are derived.

Source: Higham 2002, Accuracy and Stability of Numerical Algorithms, sections 2.2, 3.1 and 3.5.
"""

from __future__ import annotations

from loraover.common.later import torch

U32, U64 = 2.0**-24, 2.0**-53
"""Unit roundoffs of float32 and float64."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return u, the largest relative error of rounding once to nearest in a floating-point type."""
    return torch.finfo(dtype).eps / 2


def orthogonality_error(size: int, dtype: torch.dtype) -> float:
    """Return how far an element of Q^T Q may be from the identity's, for an orthogonal factor Q computed in `dtype`.

    Each of the `size` reflections of a Householder QR rounds some `size` times: the columns of Q err by gamma_{c
    size^2}, and by c size u if roundings are independent (Higham and Mary 2019, doi:10.1137/18M1226312). Ten standard
    deviations of it leave room for an eigensolver; Q^T Q errs by twice as much.
    """
    return 20 * size * unit_roundoff(dtype)


def smallest_subnormal(dtype: torch.dtype) -> float:
    """Return the spacing of a type's numbers near zero; half of it bounds the error of rounding once there."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def gamma(terms: int, unit: float) -> float:
    """Return gamma_k = k u / (1 - k u), a bound of the relative error after k roundings in any order.

    Args:
        terms: Number of roundings, k.
        unit: Unit roundoff, u.

    Raises:
        ValueError: k u is 1 or more, so that no bound exists.
    """
    if terms * unit >= 1:
        raise ValueError(f"no rounding bound for {terms} operations at unit roundoff {unit:.3g}")
    return terms * unit / (1 - terms * unit)
