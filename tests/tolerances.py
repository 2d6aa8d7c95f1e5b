"""Tolerances derived from rounding-error analysis; nothing here is measured or taken from the product.

Source: Higham 2002, Accuracy and Stability of Numerical Algorithms, sections 3.1, 3.5 and 19.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, sqrt

import torch

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""u of each type, from its significand's length in IEEE 754 (bfloat16: its first 16 bits of binary32)."""

UNDERFLOW = {torch.float64: 2.0**-1000, torch.float32: 2.0**-100}
"""What products below the normal range can add up to: each loses half a subnormal, 2^-1075 or 2^-150."""

HOUSEHOLDER = 8
"""The "small integer constant" c of Higham's gamma~_k = c k u / (1 - c k u), section 3.4."""


def gamma(terms: float, unit: float) -> float:
    """gamma_k = k u / (1 - k u), the relative error after k roundings."""
    return terms * unit / (1 - terms * unit)


def chain_terms(core_shapes: Sequence[tuple[int, int]]) -> int:
    """More roundings than any order of contracting such cores puts behind one element.

    Every index that is summed over is a side of some core, and a sum of k products costs k roundings.
    """
    return sum(p + q for p, q in core_shapes)


def qr_error(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> float:
    """Bound of the Frobenius norm of (computed Q) - (an exactly orthonormal Q), Higham (19.13)."""
    return sqrt(min(rows, columns)) * gamma(HOUSEHOLDER * rows * columns, UNIT[dtype])


def isometry_error(rows: int, columns: int) -> float:
    """Bound of the Frobenius norm of P P^T - I for a computed Q: 2 d + d^2 plus the product's own rounding."""
    d = qr_error(rows, columns)
    return 3 * d + gamma(rows + columns, UNIT[torch.float64]) * min(rows, columns)


def round_trip_error(core_shapes: Sequence[tuple[int, int]], centre: int) -> float:
    """Bound of |contract(init(M)) - M|_F / |M|_F in float64.

    Each auxiliary core loses its orthonormality error twice (P, then P^T) and takes part in two products,
    whose error is gamma times the Frobenius norms; an isometry's is sqrt(its shorter side) at most.
    """
    terms = 2 * chain_terms(core_shapes)
    auxiliary = [shape for k, shape in enumerate(core_shapes) if k != centre]
    products = 2 * (1 + sum(min(p, q) for p, q in auxiliary)) * gamma(terms, UNIT[torch.float64])
    return products + 2 * sum(isometry_error(p, q) for p, q in auxiliary)


def binomial_deviation(trials: int, chance: float, failure: float = 1e-9) -> float:
    """What a binomial count strays from its mean by, at most, but for a probability of `failure` (Bernstein)."""
    budget = log(2 / failure)
    return budget / 3 + sqrt((budget / 3) ** 2 + 2 * trials * chance * (1 - chance) * budget)
