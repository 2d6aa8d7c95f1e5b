"""The judge's estimates over prompts with NumPy and SciPy, of many sets of prompts at once.

Written from Huber 1964, doi:10.1214/aoms/1177703732, and Liang and Zeger 1986, doi:10.1093/biomet/73.1.13.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CLIP, STEPS, TO_SIGMA = 2.5, 20, 1.4826
BY_CHANCE = 1e-4

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Projections:
    """A change along a direction, of shape (..., prompts, positions).

    Args:
        along: x, the product of the change and the direction, in square nats.
        size: w, the square of the direction; 0 where there is no such position.
        total: The square of the change.
    """

    along: Floats
    size: Floats
    total: Floats


@dataclass(frozen=True)
class Estimate:
    """An estimate with its interval; each field has the leading shape of the projections.

    Args:
        value: The estimate.
        half: Half the width of the interval in which the truth lies, but for BY_CHANCE of the cases.
        weight: The sum of phi w of a strength, in square nats.
    """

    value: Any
    half: Any
    weight: Any = None

    @property
    def low(self) -> Any:
        """Lower end of the interval."""
        return self.value - self.half

    @property
    def high(self) -> Any:
        """Upper end of the interval."""
        return self.value + self.half


def strength(found: Projections) -> Estimate:
    """The robust factor of the direction in the change, x = s w."""
    x, w = found.along, found.size
    present, root = w > 0, np.sqrt(w)
    safe = np.where(present, root, 1.0)
    value = _over(x, w)
    start = _median(x / safe**2, present)[..., 0, 0]
    value = np.where(np.isfinite(start), start, value)
    for _ in range(STEPS):
        residual = (x - value[..., None, None] * w) / safe
        phi, _ = _clipped(residual, present)
        value = _over(phi * x, phi * w)
    residual = (x - value[..., None, None] * w) / safe
    phi, inside = _clipped(residual, present)
    return Estimate(value, _half(phi * root * residual, w, w * inside), (phi * w).sum((-1, -2)))


def log_ratios(logs: Floats) -> Estimate:
    """Mean over prompts of logarithms, with its interval by Student's t.

    Args:
        logs: Shape (..., prompts).
    """
    prompts = logs.shape[-1]
    if prompts < 2:
        return Estimate(logs.mean(-1), math.inf)
    error = logs.std(-1, ddof=1) / math.sqrt(prompts)
    return Estimate(logs.mean(-1), error * float(stats.t.isf(BY_CHANCE / 2, prompts - 1)))


def _median(values: Floats, present: NDArray[np.bool_]) -> Floats:
    """Median over prompts and positions, whose axes stay; NaN where there is none."""
    if present.all():
        return np.median(values, axis=(-2, -1), keepdims=True)
    with np.errstate(all="ignore"):
        return np.nanmedian(np.where(present, values, np.nan), axis=(-2, -1), keepdims=True)


def _clipped(residual: Floats, present: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.bool_]]:
    """The weights phi, and whether a residual is within CLIP scales."""
    size = np.abs(residual)
    limit = CLIP * np.nan_to_num(TO_SIGMA * _median(size, present))
    inside = (size <= limit) | (limit == 0)
    return np.where(inside, 1.0, limit / np.where(size > 0, size, 1.0)), inside


def _half(scores: Floats, w: Floats, bread: Floats) -> Floats:
    """Half the width of the interval, from the positions' scores and their derivatives."""
    sums, weights = scores.sum(-1), w.sum(-1)
    prompts = weights.astype(bool).sum(-1)
    even = _over(weights.sum(-1) ** 2, (weights**2).sum(-1), axis=())
    correction = prompts / np.maximum(prompts - 1, 1)
    error = np.sqrt(correction * (sums**2).sum(-1)) / np.maximum(bread.sum((-2, -1)), np.finfo(float).tiny)
    half = error * stats.t.isf(BY_CHANCE / 2, np.maximum(even - 1, 1))
    return np.where((prompts > 1) & (weights.sum(-1) > 0), half, np.inf)


def _over(numerator: Floats, denominator: Floats, axis: tuple[int, ...] = (-2, -1)) -> Floats:
    below = denominator.sum(axis)
    found: Floats = np.divide(numerator.sum(axis), below, out=np.zeros_like(below), where=below > 0)
    return found
