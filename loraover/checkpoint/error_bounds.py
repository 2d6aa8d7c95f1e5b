"""Bounds of rounding errors, from which certificates and checks are derived.

Source: Higham 2002, Accuracy and Stability of Numerical Algorithms, sections 2.2, 3.1 and 3.5.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from loraover.common.arrays import name_of

if TYPE_CHECKING:
    import numpy as np
    import torch

    AnyDtype = torch.dtype | np.dtype[Any]

U32, U64 = 2.0**-24, 2.0**-53
"""Unit roundoffs of float32 and float64."""


class BinaryFormat(NamedTuple):
    """A floating-point type.

    Args:
        roundoff: Unit roundoff u, the largest relative error of rounding once to nearest.
        normal: Smallest normal number.
        largest: Largest finite number.
    """

    roundoff: float
    normal: float
    largest: float


FORMATS = {
    "float64": BinaryFormat(U64, 2.0**-1022, (2 - 2.0**-52) * 2.0**1023),
    "float32": BinaryFormat(U32, 2.0**-126, (2 - 2.0**-23) * 2.0**127),
    "bfloat16": BinaryFormat(2.0**-8, 2.0**-126, (2 - 2.0**-7) * 2.0**127),
    "float16": BinaryFormat(2.0**-11, 2.0**-14, 65504.0),
}


@cache
def format_of(dtype: AnyDtype) -> BinaryFormat:
    """Return the floating-point type that a data type of PyTorch or NumPy stands for."""
    text = str(dtype)
    return FORMATS[text.removeprefix("torch.") if text.startswith("torch.") else name_of(dtype)]


def unit_roundoff(dtype: AnyDtype) -> float:
    """Return u, the largest relative error of rounding once to nearest in a floating-point type."""
    return format_of(dtype).roundoff


def orthogonality_error(size: int, dtype: AnyDtype) -> float:
    """Return how far an element of Q^T Q may be from the identity's, for an orthogonal factor Q computed in `dtype`.

    Each of the `size` reflections of a Householder QR rounds some `size` times: the columns of Q err by gamma_{c
    size^2}, and by c size u if roundings are independent (Higham and Mary 2019, doi:10.1137/18M1226312). Ten standard
    deviations of it leave room for an eigensolver; Q^T Q errs by twice as much.
    """
    return 20 * size * unit_roundoff(dtype)


def smallest_subnormal(dtype: AnyDtype) -> float:
    """Return the spacing of a type's numbers near zero; half of it bounds the error of rounding once there."""
    found = format_of(dtype)
    return found.normal * 2 * found.roundoff


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
