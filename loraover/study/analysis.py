"""From the losses of finished runs to differences with intervals.

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
from pydantic import BaseModel, ConfigDict, Field
from scipy import optimize, stats

Losses = NDArray[np.float64]
"""Shape (seeds, examples): nats of each completion."""

DRAWS = 4000
POWER = 0.8
"""Probability with which a study would show a difference that it could have seen."""
BASIN = 0.01
"""Share of the lowest loss by which losses may be higher and still belong to the basin: the rates that do well."""


class Difference(BaseModel):
    """A method's test loss minus the baseline's, each at its own tuned rate, in nats per token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float = Field(description="Mean difference; below 0: better than the baseline.")
    interval: tuple[float, float] = Field(description="95 % interval, over seeds and examples together.")
    p: float = Field(description="Two-sided p value, Holm-adjusted over tasks.")


class RateSensitivity(BaseModel):
    """How much a method's loss depends on its learning rate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    losses: dict[str, float] = Field(description="Mean validation loss by rate; rates that diverged are left out.")
    seed_losses: dict[str, list[float]] = Field(
        default_factory=dict, description="Validation loss of each seed by rate; empty in older files."
    )
    best_rate: float = Field(description="Rate with the lowest mean validation loss.")
    is_bracketed: bool = Field(description="Whether the sweep has rates below and above the best one.")
    basin_decades: float = Field(
        description="Width, in decades of the learning rate, of the range whose loss is within 1 % of the lowest."
    )
    is_basin_cut: bool = Field(description="Whether that range reaches an end of the sweep.")
    regret: float | None = Field(
        description="Mean over the sweep of loss / lowest loss - 1; None: infinite, a rate diverged or the lowest is 0."
    )
    diverged: int = Field(description="Number of rates at which a run diverged, or failed otherwise.")


@dataclass(frozen=True)
class Halves:
    """Halves of the held-out examples: the even ones choose the rates, the odd ones judge.

    Args:
        count: Number of held-out examples.
    """

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
        losses: Nats of each completion, shape (seeds, examples).
        tokens: Tokens of each completion, shape (examples,).
    """
    return float(losses.sum() / (len(losses) * tokens.sum()))


def difference(method: Losses, baseline: Losses, tokens: Losses, seed: int = 0) -> Difference:
    """Compare a method with the baseline, paired by seed and example.

    The standard error comes from the pigeonhole bootstrap: seeds and examples are drawn again independently of each
    other, since every seed answers the same examples (Owen 2007, doi:10.1214/07-AOAS122). From n, n - 1 are drawn, so
    that the variances of seeds and examples are unbiased; the noise of single answers counts more than once, which
    makes the interval too wide rather than too narrow. It is a t interval with one degree of freedom less than seeds.

    Args:
        method: Nats of the method, shape (seeds, examples); at least 2 of each.
        baseline: Nats of the baseline, of the same shape.
        tokens: Tokens of each completion, shape (examples,).
        seed: Seed of the bootstrap.
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


def detectable(found: Difference, seeds: int) -> float:
    """Smallest true difference, in nats per token, that a study of this spread would show.

    A two-sided t test at a level of 5 % would find it with a probability of `POWER`.

    Args:
        found: The measured difference, whose interval has the standard error.
        seeds: Number of seeds.
    """
    freedom = seeds - 1
    limit = float(stats.t.ppf(0.975, freedom))
    error = (found.interval[1] - found.interval[0]) / (2 * limit)
    shift = optimize.brentq(lambda mean: stats.nct.sf(limit, freedom, mean) - POWER, 0.0, 10 * limit)
    return error * float(shift)


def sensitivity(
    by_rate: Mapping[float, float], seed_losses: Mapping[float, Sequence[float]] | None = None
) -> RateSensitivity:
    """Describe how a method's loss depends on its rate.

    Args:
        by_rate: Mean validation loss at each rate; one that is not finite is worse than any other.
        seed_losses: Validation loss of each seed, at rates without a failed run.
    """
    rates = sorted(by_rate)
    losses = [by_rate[rate] if math.isfinite(by_rate[rate]) else math.inf for rate in rates]
    best = int(np.argmin(losses))
    limit = (1 + BASIN) * losses[best]
    low, cut_low = _edge(rates, losses, best, -1, limit)
    high, cut_high = _edge(rates, losses, best, 1, limit)
    diverged = losses.count(math.inf)
    return RateSensitivity(
        losses={f"{rate:g}": loss for rate, loss in zip(rates, losses, strict=True) if math.isfinite(loss)},
        seed_losses={f"{rate:g}": list(each) for rate, each in sorted((seed_losses or {}).items())},
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
