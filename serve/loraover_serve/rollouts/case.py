"""Estimates from the logprobs of sampled tokens: which models the engine does not have, and how strong its adapter is.

Let e be the engine's logprob of a sampled token, a the trainer's with the adapter, b without, and c that of any model
that the engine could have by mistake: b itself, an earlier adapter, another one. The strength of e - c along a - c is 1
if the engine has the adapter as it is, and 0 if it has c. So c is *excluded* if the interval of this strength lies
above 1/2, and the engine is *nearer* to c than to the right adapter if it lies below.

Rounding moves the strength towards 1/2 from both sides, since the noise of a and c is in both factors of its product.
With noise n in a and in c, a right engine has the strength (1 + k) / 2 and a wrong one (1 - k) / 2, where

    k = 1 - 2 n^2 / rms(a - c)^2.

For n, the judge takes the distance of e from a while the adapter is zero. It is the noise of both together, so k is a
lower bound. The middle stays 1/2, so that young adapters can be judged too, but the scale of the adapter is judged only
if k is above RELIABLE. All arrays must be computed in the engine's number format: in a coarser one than the trainer's,
changes by a young adapter vanish.

A loop is judged at each of thousands of steps. So an alarm needs a strength that is off by ALARM times the half
interval. The plain half is enough if it is less than k / 2, which is the distance of a right engine from 1/2.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from statistics import fmean
from typing import Final, NamedTuple

from loraover_serve.judge.case import allowed_strength, sure_errors
from loraover_serve.judge.estimates import Fit, Interval, fit_strength
from loraover_serve.judge.limits import CERTAIN, COARSER, EXACT, EXPLAINED, FEW_PROMPTS, FLOOR, NUMBER_FORMATS
from loraover_serve.judge.names import NOT_APPLIED
from loraover_serve.judge.results import LogprobDistance, Off
from loraover_serve.judge.search import LEFT, NEARLY, ROUNDED_WAY
from loraover_serve.rollouts.tokens import SampledTokens

HALF_WAY = 0.5
"""Strength of an engine that is as far from the right adapter as from another model."""

RELIABLE = 0.8
"""Smallest share of a change's square that has to be more than noise before the size of the change is judged."""

SAME = 1e-3
"""Share of the adapter's change by which two models may differ and still count as equal."""

ALARM = 2.0
"""Multiple of the half interval by which a strength must be off to raise an alarm."""

HALF, TWICE = "half the scale", "twice the scale"
FACTORS: Final[Mapping[str, float]] = {HALF: 0.5, TWICE: 2.0}
"""Factors on delta_W that are looked for in every loop."""


class Compared(NamedTuple):
    """A model that the engine could have, compared with the right one.

    Args:
        strength: Strength of e - c along a - c: 1 if the engine is right, 0 if it has this model.
        reliable: Smallest share of rms(a - c)^2 that cannot be noise.
        rms: RMS distance of the engine from this model, in nats.
        is_excluded: Whether the engine is nearer to the right model.
        is_nearer: Whether the engine is nearer to this model.
        explains: Whether noise explains how far the engine is from this model.
    """

    name: str
    strength: Interval
    reliable: float
    rms: float
    is_excluded: bool
    is_nearer: bool
    explains: bool


class RolloutCase:
    """Sampled tokens, with the estimates that the verdict asks of them.

    Args:
        noise: RMS difference of a right engine from the trainer, in nats; None if it is not known.
    """

    def __init__(self, tokens: SampledTokens, noise: float | None) -> None:
        self.tokens, self.known_noise = tokens, noise
        self.models = {NOT_APPLIED: tokens.base, **tokens.models}
        factors = {**FACTORS, **tokens.factors}
        self.factors = {name: factor for name, factor in factors.items() if name not in tokens.models}
        self.prompts = len({*tokens.prompts})
        self.effect = self.apart(tokens.right, tokens.base)
        self.distance = self.apart(tokens.engine, tokens.right)
        self.fit = self.fit_from(tokens.base)
        self.along = self.fit.interval

    def apart(self, one: Sequence[float], other: Sequence[float]) -> float:
        """RMS distance of two models, in nats, at the tokens that both have."""
        squares = [(x - y) ** 2 for x, y in zip(one, other, strict=True) if y == y]
        return math.sqrt(fmean(squares)) if squares else 0.0

    def fit_from(self, model: Sequence[float], right: Sequence[float] | None = None) -> Fit:
        """Strength of the right model, or of the one in its place, in the difference of the engine from a model."""
        arrays = zip(self.tokens.prompts, self.tokens.engine, right or self.tokens.right, model, strict=True)
        return fit_strength([(p, (e - c) * (a - c), (a - c) ** 2) for p, e, a, c in arrays if c == c and a == a])  # type: ignore[misc]

    @cached_property
    def fitted(self) -> list[float]:
        """Logprobs with the factor on the adapter's change that explains the engine best, to first order."""
        return [b + self.along.value * (a - b) for a, b in zip(self.tokens.right, self.tokens.base, strict=True)]

    @cached_property
    def noise(self) -> float:
        """The known noise, else the distance of the engine from known models, the nearest one in each row."""
        if self.known_noise is not None:
            return self.known_noise
        square = self.nearest_square(self.tokens.right, self.fitted, *self.models.values())
        return math.sqrt(square / len(self.tokens.engine))

    def nearest_square(self, *models: Sequence[float]) -> float:
        """Sum over rows of the squared distance of the engine from the model that is nearest in the row."""
        nearest = dict.fromkeys(self.tokens.rows, math.inf)
        for model in models:
            sums = dict.fromkeys(nearest, 0.0)
            for row, e, c in zip(self.tokens.rows, self.tokens.engine, model, strict=True):
                sums[row] += (e - c) ** 2 if c == c else math.inf
            nearest = {row: min(square, sums[row]) for row, square in nearest.items()}
        return math.fsum(nearest.values())

    def reliable(self, effect: float, noise: float | None = None) -> float:
        """Smallest share of the square of an effect, in nats, that cannot be noise."""
        return 1 - 2 * (self.noise if noise is None else noise) ** 2 / effect**2 if effect else -math.inf

    def bounded(self, half: float, fit: Fit) -> float:
        """Half an interval; on an exact engine, at most the error that CERTAIN times its noise can cause."""
        if self.known_noise is None or self.known_noise > EXACT:
            return half
        return min(half, fit.certain(CERTAIN * (self.known_noise + FLOOR) * math.sqrt(len(self.tokens.engine))))

    def compare(self, name: str, model: Sequence[float]) -> Compared:
        """Compare the engine with a model that it could have."""
        effect = self.apart(self.tokens.right, model)
        fit = self.fit_from(model)
        found, reliable, rms = fit.interval, self.reliable(effect), self.apart(self.tokens.engine, model)
        alarm = found.half if self.prompts >= FEW_PROMPTS else math.inf
        alarm = self.bounded(alarm if alarm <= reliable / 2 else ALARM * alarm, fit)
        found = Interval.around(found.value, self.bounded(found.half, fit))
        is_near = rms <= self.limit or rms <= LEFT * self.distance
        return Compared(
            name,
            found,
            reliable,
            rms,
            found.low > HALF_WAY,
            found.value + alarm < HALF_WAY,
            is_near and abs(found.value) <= ROUNDED_WAY + (1 - max(reliable, 0.0)) / 2,
        )

    @property
    def limit(self) -> float:
        """Largest distance from a model, in nats, that noise explains; half the right model's if noise is not known."""
        return EXPLAINED * self.distance if self.known_noise is None else COARSER * self.known_noise + FLOOR

    @cached_property
    def compared(self) -> list[Compared]:
        """Comparisons with all known models, except the right one, and the base model under another name."""
        found = [self.compare(name, model) for name, model in self.models.items() if name not in self.twins]
        return [each for each in found if each.reliable > -math.inf]

    @cached_property
    def twins(self) -> list[str]:
        """Names of models that equal the base model, such as an earlier adapter whose B was zero."""
        computed = {name: model for name, model in self.tokens.models.items() if any(value == value for value in model)}
        base, most = self.tokens.base, SAME * self.effect
        return [name for name, model in computed.items() if self.apart(base, model) <= most]

    @cached_property
    def reliable_size(self) -> float:
        """Smallest share of the adapter's squared change that is not noise, if the engine's distance is noise too."""
        return self.reliable(self.effect, max(self.noise, self.distance))

    @cached_property
    def allowed(self) -> tuple[float, float]:
        """Strengths that a right engine can have: from the part of the change that rounding leaves, to all of it."""
        number_format = NUMBER_FORMATS[0] if self.noise <= EXACT else None
        return allowed_strength(number_format, (1 + max(self.reliable(self.effect), 0.0)) / 2)

    def is_beyond(self) -> bool:
        """Whether the strength of the adapter is not that of a right engine."""
        if self.reliable(self.effect) < RELIABLE:
            return False
        half = self.bounded(ALARM * self.along.half if self.prompts >= FEW_PROMPTS else math.inf, self.fit)
        return self.along.value + half < self.allowed[0] or self.along.value - half > self.allowed[1]

    def is_further(self) -> bool:
        """Whether the engine is further from the trainer than its noise explains, in any direction."""
        if self.known_noise is None:
            return False
        squares = zip(self.tokens.prompts, self.tokens.engine, self.tokens.right, strict=True)
        found = LogprobDistance.of([Off(p, (e - a) ** 2, abs(e - a)) for p, e, a in squares])  # type: ignore[arg-type]
        return found.rms - sure_errors(found.prompts) * found.error > CERTAIN * (self.known_noise + FLOOR)

    def untold(self) -> list[str]:
        """Models that were given and cannot be compared, with the reason."""
        told = {*self.twins, *(each.name for each in self.compared)}
        why = {
            name: "as the right adapter" if any(value == value for value in model) else "not computed"
            for name, model in self.models.items()
        }
        return [f"{name} ({why[name]})" for name in self.models if name not in told and self.effect]

    def factors_left(self) -> list[str]:
        """Factors on delta_W that the interval of the strength does not exclude."""
        found = Interval.around(self.along.value, self.bounded(self.along.half, self.fit))
        share = min(1.0, max(0.0, self.reliable(self.effect)))
        return [
            name
            for name, factor in self.factors.items()
            if factor != 1
            and not (found.low > (1 + factor) / 2 if factor < 1 else found.high < HALF_WAY + factor * share / 2)
        ]

    def mixed(self, model: Sequence[float]) -> tuple[list[Hashable], list[Hashable]]:
        """Rows that have a model, and rows that have the right one, among the rows that tell the two apart."""
        sums = defaultdict[Hashable, list[tuple[float, float]]](list)
        arrays = zip(self.tokens.rows, self.tokens.engine, self.tokens.right, model, strict=True)
        for row, e, a, c in arrays:
            if c == c:
                sums[row].append(((e - c) * (a - c), (a - c) ** 2))
        least = (2 * CERTAIN * (self.noise + FLOOR)) ** 2
        bad, good, other = list[Hashable](), list[Hashable](), 0
        for row, each in sums.items():
            size = math.fsum(w for _, w in each)
            if size > least:
                value = math.fsum(x for x, _ in each) / size
                if abs(value) <= ROUNDED_WAY:
                    bad.append(row)
                elif abs(value - 1) <= ROUNDED_WAY:
                    good.append(row)
                else:
                    other += 1
        return (bad, good) if len(bad) + len(good) >= NEARLY * (len(bad) + len(good) + other) else ([], good)
