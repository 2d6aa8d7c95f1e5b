"""Contraction of absolute core values, which bounds the rounding errors."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log2

import torch
from torch import Tensor

from loraover.checkpoint.error_bounds import gamma, unit_roundoff
from loraover.overparam.core_group import is_full_precision
from loraover.overparam.decompositions import Decomposition

LARGEST_LOSS = 2.0**-104
"""Loss whose part in a certificate, gamma_k(2^-53) times it, is below half of float32's smallest number, 2^-150."""


def magnitude(decomposition: Decomposition, cores: Sequence[Tensor], m: int, n: int) -> Tensor:
    """Return an upper bound of |C_1| ... |C_K|, the contraction of the cores' absolute values.

    It is the contraction in the cores' dtype, raised by what that contraction may have rounded away:

        |C_1| ... |C_K|  <=  (1 + gamma_k(u)) (computed + lost)

    Cores in float32 that could overflow, or lose more than would be noticed, are contracted in float64.
    `docs/error-bounds.md` derives it.

    Args:
        decomposition: Decomposition of the cores.
        cores: Cores (G, p_k, q_k), float32 or float64.
        m: Rows of the matrices.
        n: Columns of the matrices.

    Returns:
        Bounds (G, m, n), float64.
    """
    sizes = [core.abs() for core in cores]
    terms = decomposition.contraction_terms(m, n)
    dtype, lost = cores[0].dtype, 0.0
    computed = None
    if dtype == torch.float32:
        lost = lost_to_underflow(terms, cores)
        if lost <= LARGEST_LOSS and is_full_precision(cores[0].device):
            computed = decomposition.contract(sizes, m, n)
    if computed is None or not bool(torch.isfinite(computed.amax())):
        dtype, lost = torch.float64, 0.0
        computed = decomposition.contract([size.double() for size in sizes], m, n)
    raised = 1 + gamma(terms + 2, unit_roundoff(dtype))  # two more for the sum and the product below
    return computed.double().contiguous().add_(lost).mul_(raised)


def lost_to_underflow(terms: int, cores: Sequence[Tensor]) -> float:
    """Return a bound of what an element of a float32 contraction can lose below the normal range.

    Each of K cores lies on at most N = (k / (K - 1))^(K - 1) paths to an element, and each product on a path loses at
    most the smallest normal number, times the numbers that follow it on the path.

    Args:
        terms: Terms k of the contraction.
        cores: Cores of the matrices.
    """
    products = max(len(cores) - 1, 1)
    exponent = 1 + log2(len(cores)) + products * log2(terms / products) - 126
    exponent += sum(log2(max(1.0, float(core.abs().amax()))) for core in cores)
    return 2.0**exponent if exponent < 1024 else inf
