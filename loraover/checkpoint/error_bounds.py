"""Rounding-error bounds that certificates and checks are derived from.

Source: Higham 2002, Accuracy and Stability of Numerical Algorithms, sections 2.2, 3.1 and 3.5.
"""

from __future__ import annotations

import torch


def unit_roundoff(dtype: torch.dtype) -> float:
    """u of a floating-point type: the largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def smallest_subnormal(dtype: torch.dtype) -> float:
    """Spacing of the type's numbers around zero; half of it bounds a rounding there."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def gamma(terms: int, unit: float) -> float:
    """gamma_k = k u / (1 - k u): relative growth of error over k roundings, in any order.

    Raises:
        ValueError: k u is not below 1, so that there is no bound.
    """
    if terms * unit >= 1:
        raise ValueError(f"no rounding bound for {terms} operations at unit roundoff {unit:.3g}")
    return terms * unit / (1 - terms * unit)
