"""SoMA, LoRASC, federated LoRA and TensorGuide in NumPy, from the papers' descriptions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def minor_part(weight: Matrix, r: int) -> Matrix:
    """The part of a matrix that belongs to its r smallest singular values: Yun et al. 2025, section 3."""
    values, vectors = np.linalg.eigh(weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight)
    assert (np.diff(values) > 0).all()
    kept = vectors[:, :r] @ vectors[:, :r].T  # a projector, whatever the signs of the vectors
    part: Matrix = kept @ weight if len(weight) <= weight.shape[1] else weight @ kept
    return part


def soma(weight: Matrix, a: Matrix, b: Matrix, scaling: float) -> Matrix:
    """The update of the weight: trained factors on the residual, minus the weight."""
    residual = weight - minor_part(weight, len(a))
    found: Matrix = residual + scaling * b @ a - weight
    return found


def slow_sum(fast: Sequence[Matrix], pace: float) -> Matrix:
    """What the stages add to the weight: each blends its update into the slow one, and adds the slow one."""
    slow = total = np.zeros_like(fast[0])
    for update in fast:
        slow = (1 - pace) * slow + pace * update
        total = total + slow
    return total


def clipped_mean(gradients: Sequence[Sequence[Matrix]], clip: float) -> list[Matrix]:
    """Mean of the rows' gradients, each cut to a norm over all of its matrices: Abadi et al. 2016, algorithm 1."""
    total = [np.zeros_like(g) for g in gradients[0]]
    for row in gradients:
        norm = np.sqrt(sum(float((g**2).sum()) for g in row))
        total = [t + g * min(1.0, clip / norm) for t, g in zip(total, row, strict=True)]
    return [t / len(gradients) for t in total]


def gaussian_epsilon(noise: float, rate: float, steps: int, delta: float, orders: Sequence[float]) -> float:
    """Epsilon of the sampled Gaussian mechanism: Renyi divergences as sums on a grid, converted by Balle et al. 2020.

    Args:
        noise: Standard deviation as a multiple of the largest norm.
        rate: Probability with which a step draws a row.
        steps: Number of steps.
        delta: Delta of the guarantee.
        orders: Orders of the divergences, of which the best counts.
    """
    x, width = np.linspace(-20 * noise, max(orders) + 20 * noise, 200_001, retstep=True)
    log_density = -((x / noise) ** 2) / 2 - np.log(noise * np.sqrt(2 * np.pi))
    log_ratio = np.logaddexp(np.log1p(-rate) if rate < 1 else -np.inf, np.log(rate) + (2 * x - 1) / (2 * noise**2))
    found = np.inf
    for order in orders:
        divergence = steps * (np.logaddexp.reduce(log_density + order * log_ratio) + np.log(width)) / (order - 1)
        epsilon = divergence + np.log1p(-1 / order) - (np.log(delta) + np.log(order)) / (order - 1)
        found = min(found, epsilon)
    return float(found)


def train_operands(z: Any, cores: Sequence[Any]) -> list[Any]:
    """Arguments of NumPy's or PyTorch's einsum for all sums of a tensor train at once: Oseledets 2011, section 4.3."""
    d = len(cores)
    operands: list[Any] = [z, list(range(d))]
    for k, core in enumerate(cores):
        operands += [core, [2 * d + k, k, d + k, 2 * d + k + 1]]
    return [*operands, list(range(d, 2 * d))]


def guided_pair(z: Matrix, cores: Sequence[Matrix], r: int, in_features: int) -> tuple[Matrix, Matrix]:
    """A and B_y of a module, number by number: Qi et al. 2025, and the order of the authors' code."""
    y = np.einsum(*train_operands(z, cores), optimize=True).ravel()
    a = np.empty((r, in_features))
    b = np.empty((y.size // r - in_features, r))
    for j in range(r):
        for i in range(in_features):
            a[j, i] = y[i * r + j]
        for o in range(len(b)):
            b[o, j] = y[in_features * r + j * len(b) + o]
    return a, b
