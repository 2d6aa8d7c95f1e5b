"""Tests of equivalence and of difference on paired log-ratios: is one arm as fast as another?

A measure x (a time) is compared by d = log x_B - log x_A, one number for each block in which both arms ran. The mean
of d is the log of a ratio of geometric means. With a margin m, the arms are

- *equivalent* if both one-sided t tests reject |mean d| >= log(1 + m) at alpha (TOST: Schuirmann 1987,
  doi:10.1007/BF01068419), so that Student's interval of confidence 1 - 2 alpha lies inside the margin, and if the
  studentised bootstrap interval of that confidence lies inside it, too, which is the wider one where d is skewed;
- *different* if the studentised bootstrap interval of mean d lies entirely beyond the margin, at the confidence that
  Holm's correction over all comparisons requires (Holm 1979); a real difference within the margin does not count;
- *inconclusive* otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from loraover.common.errors import ParityError
from loraover.common.multiple_testing import holm
from loraover_serve.parity.request import MIN_BLOCKS

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


Verdict = Literal["equivalent", "different", "inconclusive"]
Key = TypeVar("Key", bound=Hashable)
ALPHA = 0.05
"""Level of significance."""
FEWEST_NEEDED = 8  # with fewer blocks the bootstrap interval is wider than Student's, which `blocks_needed` uses
MAX_BLOCKS, POWER = 100_000, 0.9
LARGEST = 700.0  # a logarithm whose exponential is still finite


@dataclass(frozen=True)
class Comparison:
    """Measure of two arms.

    Args:
        mean: Mean of d, the log of the ratio of geometric means, second arm to first.
        error: Standard error of the mean.
        draws: Studentised means of the bootstrap resamples, in ascending order.
        blocks: Number of blocks, each with one value of d.
        equivalence_p: Largest p-value of four one-sided tests, two of Student and two of the bootstrap.
        difference_p: P-value of the hypothesis that the ratio lies within the margin; `decide` adjusts it (Holm).
        needed_blocks: Number of blocks that would show equivalence of equal arms with a probability of 90 %; None if
            no number would.
        confidence: Confidence of the interval that the verdict "different" depends on; `decide` adjusts it (Holm).
        verdict: "equivalent", "different" or "inconclusive", as `decide` found.
    """

    mean: float
    error: float
    draws: NDArray[np.float64]
    blocks: int
    equivalence_p: float
    difference_p: float
    needed_blocks: int | None
    confidence: float
    verdict: Verdict = "inconclusive"

    @property
    def ratio(self) -> float:
        """Ratio of geometric means, second arm to first."""
        return math.exp(self.mean)

    def interval(self, confidence: float) -> tuple[float, float]:
        """Studentised bootstrap interval of the ratio.

        Args:
            confidence: Probability that such intervals cover the true ratio, such as 0.95.
        """
        last = len(self.draws) - 1
        beyond = max(0, math.floor((1 - confidence) / 2 * (last + 2) + 1e-9) - 1)
        low, high = (self.mean - self.draws[i] * self.error for i in (last - beyond, beyond))
        return math.exp(max(low, -LARGEST)), math.exp(min(high, LARGEST))


def compare(differences: Sequence[float], *, margin: float) -> Comparison:
    """Test paired log-ratios against a margin; `decide` then gives the verdict.

    Args:
        differences: Values of d, one for each block; independent.
        margin: Largest difference of times that still counts as equal (0.05 is 5 %).

    Raises:
        ParityError: Fewer than 5 blocks, or a value that is not a finite number.
    """
    d = np.asarray(differences, dtype=np.float64)
    if len(d) < MIN_BLOCKS or not np.isfinite(d).all():
        raise ParityError(f"a comparison takes at least {MIN_BLOCKS} finite differences, found {len(d)}.")
    limit = math.log1p(margin)
    mean, spread, freedom = float(d.mean()), float(d.std(ddof=1)), len(d) - 1
    error = spread / math.sqrt(len(d))
    smallest = float(np.spacing(max(1.0, abs(mean))))
    draws = studentised(d) if error > smallest else np.zeros(RESAMPLES)
    error = max(error, smallest)  # the tests divide by it
    upper, lower = (mean - limit) / error, (mean + limit) / error  # t against both ends of the margin
    # Inequivalence has at most p = alpha where both intervals of confidence 1 - 2 alpha lie inside the margin.
    student = max(stats.t.cdf(upper, freedom), stats.t.sf(lower, freedom))
    inside = max(np.count_nonzero(draws <= upper), np.count_nonzero(draws >= lower))
    # No difference has at most p = alpha where the interval of confidence 1 - alpha lies beyond the margin.
    beyond = min(np.count_nonzero(draws >= upper), np.count_nonzero(draws <= lower))
    return Comparison(
        mean=mean,
        error=error,
        draws=draws,
        blocks=len(d),
        equivalence_p=float(max(student, (1 + inside) / (1 + len(draws)))),
        difference_p=float(min(1.0, 2 * (1 + beyond) / (1 + len(draws)))),
        needed_blocks=blocks_needed(spread, margin=margin),
        confidence=1 - ALPHA,
    )


def blocks_needed(spread: float, *, margin: float) -> int | None:
    """Smallest number of blocks that shows equivalence with a probability of POWER if the true ratio is 1.

    Args:
        spread: Standard deviation of d.
        margin: Largest difference of times that still counts as equal (0.05 is 5 %).

    Returns:
        The number; None if 100 000 blocks would not be enough.
    Source: Phillips 1990, doi:10.1007/BF01063556, with the central t as approximation of the power.
    """
    coarse = np.geomspace(100, MAX_BLOCKS, 150).astype(np.int64)
    n = np.unique(np.concatenate([np.arange(FEWEST_NEEDED, 100), coarse]))  # then in steps of 5 %
    error = max(spread, 1e-12) / np.sqrt(n)
    reach = math.log1p(margin) / error - stats.t.ppf(1 - ALPHA, n - 1)
    enough = n[2 * stats.t.cdf(reach, n - 1) - 1 >= POWER]
    return int(enough[0]) if len(enough) else None


def decide(comparisons: Mapping[Key, Comparison]) -> dict[Key, Comparison]:
    """Give every comparison its verdict, with Holm's correction of p-value and confidence.

    Args:
        comparisons: Comparisons by any key; the correction counts all of them.
    """
    p_values = [comparison.difference_p for comparison in comparisons.values()]
    return {
        key: replace(
            comparison,
            difference_p=p,
            confidence=1 - level,
            verdict="different"
            if p <= ALPHA
            else "equivalent"
            if comparison.equivalence_p <= ALPHA
            else "inconclusive",
        )
        for (key, comparison), p, level in zip(comparisons.items(), holm(p_values), holm_levels(p_values), strict=True)
    }


def holm_levels(p_values: Sequence[float]) -> list[float]:
    """Level at which Holm's method tests each p-value; it rises from step to step until one is not rejected.

    Args:
        p_values: P-values, in any order.
    """
    levels, level = [0.0] * len(p_values), 0.0
    is_open = True
    for position, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        level = ALPHA / (len(p_values) - position) if is_open else level
        levels[i] = level
        is_open = is_open and p_values[i] <= level
    return levels
