"""How much of a change is in an engine's answers: a robust regression through the origin, with errors over prompts.

Let y be what the engine changes at a position, and d a direction: what the change is in PyTorch. The strength s is 1
if the engine makes the change as it should, 0 if it does not. With x = y.d and w = d.d at each position, s solves

    sum of phi(r) (x - s w) = 0,    r = (x - s w) / sqrt(w),    phi(r) = min(1, CLIP sigma / |r|),

where sigma is the scale of r by its median. A position that is far off, such as one whose tokens went to another
expert, so has a bounded weight. Positions of one prompt share their noise: the standard error is that of the prompts'
sums (the sandwich of generalised estimating equations), and the interval has the quantile of Student's t for as many
prompts as share the weight evenly.

Source: Huber 1964, doi:10.1214/aoms/1177703732; Liang and Zeger 1986, doi:10.1093/biomet/73.1.13.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from loraover_serve.engines.answers import Expected, Row, Rows

CLIP = 2.5
"""Scales of the noise beyond which a position's residual counts no more."""

BY_CHANCE = 1e-4
"""Probability with which chance puts the strength of a sound engine outside of its interval."""

STEPS = 20
TO_SIGMA = 1.4826  # from the median of |r| to the standard deviation, for normal noise

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
    """

    value: Any
    half: Any

    @property
    def low(self) -> Any:
        """Lower end of the interval."""
        return self.value - self.half

    @property
    def high(self) -> Any:
        """Upper end of the interval."""
        return self.value + self.half


UNKNOWN = Estimate(0.0, math.inf)
"""An estimate of which nothing is known."""


def project(rows: Rows, changes: Sequence[Floats], directions: Sequence[Floats]) -> Projections:
    """Project changes on directions.

    Args:
        rows: The positions, which say to which prompt a change belongs.
        changes: Change of the logprobs at each position.
        directions: Direction at each position, of the same tokens.
    """
    places: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault(row.question, []).append(index)
    shape = (len(places), max(map(len, places.values())))
    along, size, total = (np.zeros(shape) for _ in range(3))
    for prompt, indices in enumerate(places.values()):
        for position, index in enumerate(indices):
            along[prompt, position] = changes[index] @ directions[index]
            size[prompt, position] = directions[index] @ directions[index]
            total[prompt, position] = changes[index] @ changes[index]
    return Projections(along, size, total)


def between_arms(pairs: Sequence[tuple[Row, Row]], base: Expected, adapter: Expected) -> Projections:
    """What an engine's adapter changes in its base model's answers, along what the adapter changes in PyTorch.

    Args:
        pairs: The engine's rows of the base model and of the adapter, with the same tokens.
        base: PyTorch's base model.
        adapter: PyTorch's adapted model.
    """
    changes = [two.logprobs.astype(np.float64) - one.logprobs.astype(np.float64) for one, two in pairs]
    directions = [adapter.like(one) - base.like(one) for one, _ in pairs]
    return project([one for one, _ in pairs], changes, directions)


def strength(found: Projections) -> Estimate:
    """The factor of the direction in the change; see the head of this module."""
    x, w = found.along, found.size
    present, root = w > 0, np.sqrt(w)
    safe = np.where(present, root, 1.0)
    value = _over(x, w)
    with np.errstate(invalid="ignore"):
        start = np.nanmedian(np.where(present, x / safe**2, np.nan), axis=(-2, -1))
    value = np.where(np.isfinite(start), start, value)
    for _ in range(STEPS):
        residual = (x - value[..., None, None] * w) / safe
        phi, _ = _clipped(residual, present)
        value = _over(phi * x, phi * w)
    residual = (x - value[..., None, None] * w) / safe
    phi, inside = _clipped(residual, present)
    return Estimate(value, _half(phi * root * residual, w, w * inside))


def share(found: Projections, estimate: Estimate) -> float:
    """Share of the change's square that the direction explains, at most 1."""
    total = float(found.total.sum())
    return min(1.0, float(estimate.value) ** 2 * float(found.size.sum()) / total) if total > 0 else 0.0


def log_ratio(one: Sequence[float], other: Sequence[float]) -> Estimate:
    """Mean over prompts of the logarithm of a ratio, with its interval by Student's t.

    A logarithm bounds the weight of a prompt that is far off, and both sides share the size of a prompt's noise.

    Args:
        one: Positive numbers, one for each prompt.
        other: Numbers for the same prompts.
    """
    return log_ratios(np.log(np.asarray(one)) - np.log(np.asarray(other)))


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


def _clipped(residual: Floats, present: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.bool_]]:
    """The weights phi, and whether a residual is within CLIP scales."""
    size = np.abs(residual)
    with np.errstate(all="ignore"):
        sigma = TO_SIGMA * np.nanmedian(np.where(present, size, np.nan), axis=(-2, -1), keepdims=True)
    limit = CLIP * np.nan_to_num(sigma)
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
