"""From the losses of finished runs to differences with intervals.

Every method is tuned by itself: its learning rate is the one with the lowest mean loss on the validation half of the
held-out examples. All differences are of the other half, the test half, whose examples no choice has seen; the trained
models are the same in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy import stats

Losses = NDArray[np.float64]
"""(seeds, examples): nats of each completion."""

DRAWS = 4000
BASIN = 0.01  # of the lowest loss


class Difference(BaseModel):
    """A method's test loss minus the baseline's, each at its own tuned rate, in nats per token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    interval: tuple[float, float] = Field(description="95 %, over seeds and examples together")
    p: float = Field(description="two-sided; Holm-adjusted over tasks")


class RateSensitivity(BaseModel):
    """How much a method's loss depends on its learning rate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    losses: dict[str, float] = Field(description="mean validation loss by rate; a rate that diverged is left out")
    best_rate: float
    is_bracketed: bool = Field(description="the best rate is not at an end of the sweep")
    basin_decades: float = Field(description="log10 width of the rates within 1 % of the lowest loss, interpolated")
    is_basin_cut: bool = Field(description="the basin goes on beyond the sweep")
    regret: float | None = Field(
        description="mean over the sweep of loss / lowest loss - 1; None: infinite, a rate diverged or the lowest is 0"
    )
    diverged: int = Field(description="rates at which a run diverged, or failed otherwise")


@dataclass(frozen=True)
class Halves:
    """Which held-out examples choose, and which judge: the even and the odd ones."""

    count: int

    @property
    def validation(self) -> slice:
        return slice(0, self.count, 2)

    @property
    def test(self) -> slice:
        return slice(1, self.count, 2)


def mean_loss(losses: Losses, tokens: Losses) -> float:
    """Nats per token over all seeds and examples.

    Args:
        losses: (seeds, examples).
        tokens: (examples,).
    """
    return float(losses.sum() / (len(losses) * tokens.sum()))


def difference(method: Losses, baseline: Losses, tokens: Losses, seed: int = 0) -> Difference:
    """Paired by seed and example.

    The standard error comes from the pigeonhole bootstrap: seeds and examples are drawn again independently of each
    other, since every seed answers the same examples (Owen 2007, doi:10.1214/07-AOAS122). Of n, n - 1 are drawn, so
    that the variances of seeds and of examples are without bias; the noise of single answers counts more than once,
    which errs on the wide side. The interval is a t interval with one degree of freedom less than there are seeds.

    Args:
        method, baseline: (seeds, examples); at least 2 of each.
        tokens: (examples,).
    """
    gaps = method - baseline
    seeds, examples = gaps.shape
    draw = np.random.default_rng(seed)
    of_seeds = draw.multinomial(seeds - 1, np.full(seeds, 1 / seeds), DRAWS)
    of_examples = draw.multinomial(examples - 1, np.full(examples, 1 / examples), DRAWS)
    means = np.einsum("ds,se,de->d", of_seeds, gaps, of_examples) / ((seeds - 1) * (of_examples @ tokens))
    mean, error = mean_loss(gaps, tokens), float(means.std(ddof=1))
    if error == 0.0:
        return Difference(mean=mean, interval=(mean, mean), p=1.0 if mean == 0 else 0.0)
    half = float(stats.t.ppf(0.975, seeds - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, seeds - 1))
    return Difference(mean=mean, interval=(mean - half, mean + half), p=p)


def sensitivity(by_rate: Mapping[float, float]) -> RateSensitivity:
    """From the mean validation loss at each rate; a loss that is not finite is worse than any other."""
    rates = sorted(by_rate)
    losses = [by_rate[rate] if math.isfinite(by_rate[rate]) else math.inf for rate in rates]
    best = int(np.argmin(losses))
    limit = (1 + BASIN) * losses[best]
    low, cut_low = _edge(rates, losses, best, -1, limit)
    high, cut_high = _edge(rates, losses, best, 1, limit)
    diverged = losses.count(math.inf)
    return RateSensitivity(
        losses={f"{rate:g}": loss for rate, loss in zip(rates, losses, strict=True) if math.isfinite(loss)},
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
    """log10 of the rate at which the loss crosses the limit, and whether the sweep ended before it did."""
    at = best
    while 0 <= at + direction < len(rates):
        following = at + direction
        if losses[following] > limit:
            share = 0.0 if math.isinf(losses[following]) else (limit - losses[at]) / (losses[following] - losses[at])
            here, there = math.log10(rates[at]), math.log10(rates[following])
            return here + share * (there - here), False
        at = following
    return math.log10(rates[at]), True
