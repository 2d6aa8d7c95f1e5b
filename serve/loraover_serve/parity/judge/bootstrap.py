"""Seeded bootstrap over blocks: blocks are independent of one another, but the times within a block are not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES, SEED = 4999, 0
CHUNK = 2**18  # numbers that are drawn at once


def studentised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Studentised means of RESAMPLES resamples, in ascending order.

    Each is t = (resampled mean - mean) / resampled standard error. A resample without spread has an infinite t, with
    the sign of its numerator.

    Args:
        values: One value for each block; not all equal.
    Source: Efron 1981, doi:10.2307/3314608; Davison and Hinkley 1997, Bootstrap Methods and their Application, 5.2.
    """
    draw, n = np.random.default_rng(SEED), len(values)
    centred = (values - values.mean()) / values.std()
    found = []
    for rows in _chunks(n):
        drawn = centred[draw.integers(n, size=(rows, n))]
        mean, square = drawn.mean(axis=1), np.square(drawn).mean(axis=1)
        variance = (square - mean**2) / (n - 1)  # variance of the mean
        infinite = np.copysign(np.inf, mean)
        found.append(np.divide(mean, np.sqrt(np.abs(variance)), where=variance > 1e-12 * square, out=infinite))
    return np.sort(np.concatenate(found))


def _chunks(n: int) -> list[int]:
    """Return the numbers of resamples, of n values each, that are drawn at once, which limits memory."""
    rows = max(1, CHUNK // n)
    return [min(rows, RESAMPLES - first) for first in range(0, RESAMPLES, rows)]


def quantile_intervals(blocks: Sequence[Sequence[float]], quantiles: Sequence[float]) -> list[tuple[float, float]]:
    """95 % percentile intervals of quantiles of the blocks' values.

    Blocks are resampled as units. Memory grows with the number of values, but not with RESAMPLES.

    Args:
        blocks: Values of each block; not all empty.
        quantiles: Quantiles to estimate, from 0 to 1.
    """
    n, draw = len(blocks), np.random.default_rng(SEED)
    order = np.argsort(pooled := np.concatenate(blocks), kind="stable")
    values, owner = pooled[order], np.repeat(np.arange(n), [len(block) for block in blocks])[order]
    found = []
    for rows in _chunks(max(n, len(values))):
        drawn = draw.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)  # of each block in each resample
        weights = np.cumsum(times.astype(np.int32)[:, owner], axis=1, dtype=np.int32)
        found += [values[np.searchsorted(row, np.multiply(quantiles, row[-1]))] for row in weights]
    low, high = np.quantile(np.array(found), [0.025, 0.975], axis=0, method="inverted_cdf")
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def quantile_of(blocks: Sequence[Sequence[float]], quantiles: Sequence[float]) -> list[float]:
    """Quantiles of the blocks' values.

    A quantile q is the smallest value with at least a share q of all values at or below it.

    Args:
        blocks: Values of each block; not all empty.
        quantiles: Quantiles to compute, from 0 to 1.
    """
    return [float(q) for q in np.quantile(np.concatenate(blocks), quantiles, method="inverted_cdf")]
