"""Is one arm as fast as another? Paired log-ratios, an equivalence test, and a test of difference.

A measure x (a time) is compared through d = log x_B - log x_A, one number for each block in which both arms ran. Its
mean is the log of a ratio of geometric means. With a margin m, the arms are

- *equivalent* if both one-sided t tests reject |mean d| >= log(1 + m) at alpha (TOST: Schuirmann 1987,
  doi:10.1007/BF01068419), which is the same as the 1 - 2 alpha interval lying inside the margin;
- *different* if, after Holm's correction over all comparisons (Holm 1979), t tests reject |mean d| <= log(1 + m):
  a difference that is real but smaller than the margin is nobody's concern;
- *inconclusive* otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from loraover.errors import ParityError
from loraover.statistics import holm

Verdict = Literal["equivalent", "different", "inconclusive"]
MIN_BLOCKS = 5
MAX_BLOCKS = 100_000


@dataclass(frozen=True)
class Comparison:
    """One measure of two arms.

    Args:
        ratio: of geometric means, second arm to first.
        interval: of the ratio, at confidence 1 - alpha.
        blocks: pairs.
        equivalence_p: the larger p value of the two one-sided tests.
        difference_p: of the hypothesis that the ratio lies within the margin; Holm-adjusted by `decide`.
        needed_blocks: so many would show equivalence with a probability of 90 %, were there no difference; None where
            no number would.
    """

    ratio: float
    interval: tuple[float, float]
    blocks: int
    equivalence_p: float
    difference_p: float
    needed_blocks: int | None
    verdict: Verdict = "inconclusive"


def compare(differences: Sequence[float], *, margin: float, alpha: float = 0.05) -> Comparison:
    """Test paired log-ratios against a margin; the verdict is still to be given by `decide`.

    Args:
        differences: d, one for each block; independent and about normal.
        margin: of the ratio, e.g. 0.05.
    Raises:
        ParityError: fewer than 5 blocks, or a value that is not a finite number.
    """
    d = np.asarray(differences, dtype=np.float64)
    if len(d) < MIN_BLOCKS or not np.isfinite(d).all():
        raise ParityError(f"a comparison takes at least {MIN_BLOCKS} finite differences, found {len(d)}.")
    limit = math.log1p(margin)
    mean, error, freedom = float(d.mean()), float(stats.sem(d)), len(d) - 1
    if error == 0.0:  # t tests need some spread
        error = float(np.spacing(max(1.0, abs(mean))))
    upper, lower = (mean - limit) / error, (mean + limit) / error
    half = float(stats.t.ppf(1 - alpha / 2, freedom)) * error
    beyond = min(stats.t.sf(upper, freedom), stats.t.cdf(lower, freedom))
    return Comparison(
        ratio=math.exp(mean),
        interval=(math.exp(mean - half), math.exp(mean + half)),
        blocks=len(d),
        equivalence_p=float(max(stats.t.cdf(upper, freedom), stats.t.sf(lower, freedom))),
        difference_p=float(min(1.0, 2 * beyond)),
        needed_blocks=blocks_needed(float(d.std(ddof=1)), margin=margin, alpha=alpha),
    )


def blocks_needed(spread: float, *, margin: float, alpha: float = 0.05, power: float = 0.9) -> int | None:
    """The fewest blocks that show equivalence with the given probability if the true ratio is 1.

    Args:
        spread: standard deviation of d.
    Returns:
        None if 100 000 would not do.
    Source: Phillips 1990, doi:10.1007/BF01063556, with the central t as approximation of the power.
    """
    coarse = np.geomspace(100, MAX_BLOCKS, 150).astype(np.int64)
    n = np.unique(np.concatenate([np.arange(MIN_BLOCKS, 100), coarse]))  # then in steps of 5 %
    error = max(spread, 1e-12) / np.sqrt(n)
    reach = math.log1p(margin) / error - stats.t.ppf(1 - alpha, n - 1)
    enough = n[2 * stats.t.cdf(reach, n - 1) - 1 >= power]
    return int(enough[0]) if len(enough) else None


def decide(comparisons: Mapping[str, Comparison], *, alpha: float = 0.05) -> dict[str, Comparison]:
    """Give every comparison its verdict, with Holm's correction of the p values of difference over all of them."""
    adjusted = holm([comparison.difference_p for comparison in comparisons.values()])
    return {
        name: replace(comparison, difference_p=p, verdict=_verdict(comparison, p, alpha))
        for (name, comparison), p in zip(comparisons.items(), adjusted, strict=True)
    }


def _verdict(comparison: Comparison, difference_p: float, alpha: float) -> Verdict:
    if difference_p <= alpha:
        return "different"
    return "equivalent" if comparison.equivalence_p <= alpha else "inconclusive"


def median_interval(values: Sequence[float], *, quantile: float = 0.5, seed: int = 0) -> tuple[float, float]:
    """95 % BCa bootstrap interval of a quantile; for what is reported and decides nothing.

    Source: Efron 1987, doi:10.1080/01621459.1987.10478410; scipy.stats.bootstrap.
    """
    data = np.asarray(values, dtype=np.float64)
    if len(data) < 2 or data.min() == data.max():
        return float(data.min()), float(data.max())

    def statistic(sample: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.quantile(sample, quantile, axis=axis)
        return found

    found = stats.bootstrap(
        (data,), statistic, n_resamples=2000, method="BCa", rng=np.random.default_rng(seed), vectorized=True
    ).confidence_interval
    low, high = float(found.low), float(found.high)
    if math.isnan(low) or math.isnan(high):  # BCa's correction is undefined where the jackknife has no spread
        plain = stats.bootstrap(
            (data,), statistic, n_resamples=2000, method="percentile", rng=np.random.default_rng(seed), vectorized=True
        ).confidence_interval
        low, high = float(plain.low), float(plain.high)
    return low, high
