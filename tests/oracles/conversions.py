"""delta_W of LoHa, LoKr, HRA and PiSSA in NumPy, from the papers' formulas."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def loha(a1: Matrix, b1: Matrix, a2: Matrix, b2: Matrix, scaling: float) -> Matrix:
    """Scaling times the Hadamard product of two low-rank matrices: Hyeon-Woo et al. 2021, section 2.2."""
    m, n = len(a1), b1.shape[1]
    found = np.empty((m, n))
    for i in range(m):
        for j in range(n):
            found[i, j] = scaling * (a1[i] @ b1[:, j]) * (a2[i] @ b2[:, j])
    return found


def lokr(w1: Matrix, w2: Matrix, scaling: float) -> Matrix:
    """Scaling times the Kronecker product: block (i, j) is w1[i, j] times w2. Yeh et al. 2023, section 3.2."""
    rows = [np.concatenate([w1[i, j] * w2 for j in range(w1.shape[1])], axis=1) for i in range(len(w1))]
    return scaling * np.concatenate(rows)


def hra(weight: Matrix, vectors: Matrix) -> Matrix:
    """The weight times a chain of reflections, minus the weight: Yuan et al. 2024, equation 4."""
    turned = weight.copy()
    for u in vectors.T:
        turned = turned @ (np.eye(len(u)) - 2 * np.outer(u, u) / (u @ u))
    return turned - weight


def pissa(weight: Matrix, a: Matrix, b: Matrix, scaling: float) -> Matrix:
    """The adapter on the residual of the first singular triplets, minus the weight: Meng et al. 2024, section 3."""
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    r = len(a)
    residual = (u[:, r:] * s[r:]) @ vt[r:]
    found: Matrix = residual + scaling * b @ a - weight
    return found
