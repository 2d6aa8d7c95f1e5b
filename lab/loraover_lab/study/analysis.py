"""Differences of losses between methods, with intervals, from finished runs.

Each method is tuned separately: its learning rate is the one with the lowest mean loss on one half of the held-out
examples, the validation half. Differences are measured on the other half, the test half, which no choice has seen. The
trained models are the same in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import optimize, stats

from loraover.common.strict_json import StrictModel

Losses = NDArray[np.float64]
"""Shape (seeds, examples): nats of each completion."""

LEVEL = 0.05
POWER = 0.8
"""Probability with which a study would show a difference that it could have seen."""
BASIN = 0.01
"""Share of the lowest loss by which losses may be higher and still belong to the basin: the rates that do well."""


class Difference(StrictModel):
    """A method's test loss minus the baseline's, each at its own tuned rate, in nats per token."""

    mean: float = Field(description="Mean difference; below 0: better than the baseline.")
    interval: tuple[float, float] = Field(description="95 % interval, over seeds and examples together.")
    p: float = Field(description="Two-sided p-value, Holm-adjusted over tasks.")
    detectable: float = Field(
        description="Smallest true difference that four of five studies of this task alone would show."
    )


class RateSensitivity(StrictModel):
    """How much a method's loss depends on its learning rate."""

    losses: dict[str, float] = Field(description="Mean validation loss by rate; rates that diverged are left out.")
    seed_losses: dict[str, list[float]] = Field(description="Validation loss of each seed by rate.")
    best_rate: float = Field(description="Rate with the lowest mean validation loss.")
    is_bracketed: bool = Field(description="Whether the sweep has rates below and above the best one.")
    basin_decades: float = Field(
        description="Width, in decades of the learning rate, of the range whose loss is within 1 % of the lowest."
    )
    is_basin_cut: bool = Field(description="Whether that range reaches an end of the sweep.")
    regret: float | None = Field(
        description="Mean over the sweep of loss / lowest loss - 1; None: infinite, a rate diverged or the lowest is 0."
    )
    diverged: int = Field(description="Number of rates at which a run diverged or failed.")


@dataclass(frozen=True)
class Halves:
    """Halves of the held-out examples: the even ones choose the rates, the odd ones give the test losses."""

    count: int

    @property
    def validation(self) -> slice:
        return slice(0, self.count, 2)

    @property
    def test(self) -> slice:
        return slice(1, self.count, 2)


def mean_loss(losses: Losses, tokens: Losses) -> float:
    """Nats per token over all seeds and examples."""
    return float(losses.sum() / (len(losses) * tokens.sum()))


@dataclass(frozen=True)
class Spread:
    """Variances V of a mean difference that come from the seeds and from the examples, which every seed answers.

    Half the width of an interval is sqrt(sum_i t_i^2 V_i), where t_i is Student's quantile with the degrees of freedom
    of V_i (Banerjee 1960, Sankhya 22, 357). It is Student's interval if one variance is zero, and otherwise covers a
    little more often than its level says. The noise of single answers is in both variances, so it counts twice.
    """

    variances: tuple[float, float]
    freedom: tuple[int, int]

    def half(self, level: float) -> float:
        """Half the width of the interval whose confidence is 1 - `level`."""
        quantiles = stats.t.isf(level / 2, self.freedom)
        return float(np.hypot(*(quantiles * np.sqrt(self.variances))))

    def p(self, mean: float) -> float:
        """Smallest level at which the interval around a mean leaves out zero."""
        if mean == 0:
            return 1.0
        if self.half(_SMALLEST_P) <= abs(mean):
            return 0.0
        log = optimize.brentq(lambda log: self.half(math.exp(log)) - abs(mean), math.log(_SMALLEST_P), 0.0)
        return math.exp(log)

    def detectable(self) -> float:
        """Smallest true mean that a test at `LEVEL` would find with a probability of `POWER`.

        Computed as for Student's t with as many degrees of freedom as give the interval its width.
        """
        error = math.sqrt(sum(self.variances))
        if error == 0:
            return 0.0
        low, high = sorted(self.freedom)
        limit = min(self.half(LEVEL) / error, float(stats.t.isf(LEVEL / 2, low)))
        freedom = optimize.brentq(lambda f: stats.t.isf(LEVEL / 2, f) - limit, low, 2 * high)
        return error * float(optimize.brentq(lambda m: stats.nct.sf(limit, freedom, m) - POWER, 0.0, 10 * limit))


_SMALLEST_P = 1e-30


def difference(method: Losses, baseline: Losses, tokens: Losses) -> Difference:
    """Compare a method with the baseline, paired by seed and example: nats (seeds, examples), at least 2 of each.

    Seeds and examples are both drawn from more than there are, so the variance of the mean is the sum of two: that of
    the seeds' means, and that of the examples' means as of a ratio of nats to tokens.
    """
    gaps = method - baseline
    seeds, examples = gaps.shape
    mean = mean_loss(gaps, tokens)
    of_seed, of_example = unit_variances(gaps, tokens)
    variances = of_seed / seeds, of_example / examples
    spread = Spread(variances, (seeds - 1, examples - 1))
    half = spread.half(LEVEL)
    return Difference(mean=mean, interval=(mean - half, mean + half), p=spread.p(mean), detectable=spread.detectable())


def unit_variances(gaps: Losses, tokens: Losses) -> tuple[float, float]:
    """Variance of one seed's mean difference, and of one example's share in it, in squared nats per token."""
    of_seeds = gaps.sum(1) / tokens.sum()
    of_examples = (gaps.mean(0) - mean_loss(gaps, tokens) * tokens) / tokens.mean()
    return float(of_seeds.var(ddof=1)), float(of_examples.var(ddof=1))


def percent_variances(method: Losses, baseline: Losses, tokens: Losses) -> tuple[float, float]:
    """Return the variances of `unit_variances` in squared per cent of the baseline's loss."""
    scale = (100 / mean_loss(baseline, tokens)) ** 2
    of_seed, of_example = unit_variances(method - baseline, tokens)
    return scale * of_seed, scale * of_example


def sensitivity(by_rate: Mapping[float, float], seed_losses: Mapping[float, Sequence[float]]) -> RateSensitivity:
    """Describe how a method's mean validation loss depends on its rate; a loss that is not finite is the worst."""
    rates = sorted(by_rate)
    losses = [by_rate[rate] if math.isfinite(by_rate[rate]) else math.inf for rate in rates]
    best = int(np.argmin(losses))
    limit = (1 + BASIN) * losses[best]
    low, cut_low = _edge(rates, losses, best, -1, limit)
    high, cut_high = _edge(rates, losses, best, 1, limit)
    diverged = losses.count(math.inf)
    return RateSensitivity(
        losses={f"{rate:g}": loss for rate, loss in zip(rates, losses, strict=True) if math.isfinite(loss)},
        seed_losses={f"{rate:g}": list(each) for rate, each in sorted(seed_losses.items())},
        best_rate=rates[best],
        is_bracketed=0 < best < len(rates) - 1,
        basin_decades=high - low,
        is_basin_cut=cut_low or cut_high,
        regret=None if diverged or not losses[best] else sum(loss / losses[best] - 1 for loss in losses) / len(losses),
        diverged=diverged,
    )


def _edge(
    rates: Sequence[float], losses: Sequence[float], best: int, direction: int, limit: float
) -> tuple[float, bool]:
    """Log10 of the rate at which the loss crosses the limit, and whether the sweep ends before that."""
    at = best
    while 0 <= at + direction < len(rates):
        following = at + direction
        if losses[following] > limit:
            share = 0.0 if math.isinf(losses[following]) else (limit - losses[at]) / (losses[following] - losses[at])
            here, there = math.log10(rates[at]), math.log10(rates[following])
            return here + share * (there - here), False
        at = following
    return math.log10(rates[at]), True
