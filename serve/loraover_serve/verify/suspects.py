"""The search for the fault of an adapter: PyTorch runs each fault, and the nearest to the engine's answers is named.

What the engine's adapter changes is compared, so that the base model's own noise cancels. A fault explains the answers
if, in the place of the right adapter, it would pass as one: the answers lie on the way from the right adapter to the
fault by the factor 1, and are not further off than noise. One that leaves a tenth of the distance explains it as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from loraover_serve.engines.answers import Expected, Row, Rows, paired
from loraover_serve.verify.evidence import apart, like, weigh
from loraover_serve.verify.faults import FAULTS, FaultyAdapter, RightAdapter, rescaled
from loraover_serve.verify.reference import Reference
from loraover_serve.verify.report import Suspect
from loraover_serve.verify.rules import is_further
from loraover_serve.verify.strength import project, strength
from loraover_serve.verify.variants import Variants

EXPLAINED = 0.1  # share of the adapter's distance that may remain if a fault explains it
EXACT_WAY, ROUNDED_WAY = 0.1, 0.25  # deviation from 1 of the way to a fault, on exact and on other engines
FEW, NEAREST = 3, 4  # prompts on which every fault is run, and faults that are run on all prompts
FACTORS = (2.0, 4.0, 8.0, 16.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
GOLDEN, REFINEMENTS = (math.sqrt(5) - 1) / 2, 8

Screened = tuple[float, FaultyAdapter]


class Search:
    """The search for a fault in the answers of one engine.

    Args:
        reference: PyTorch's answers.
        variants: The base model with changed adapters.
        subject: The right adapter.
        base: The engine's base model.
        adapter: The engine's adapter.
        is_exact: Whether the engine computes in float32.
    """

    def __init__(
        self,
        reference: Reference,
        variants: Variants,
        subject: RightAdapter,
        base: Rows,
        adapter: Rows,
        *,
        is_exact: bool,
    ) -> None:
        self._reference, self._variants, self._subject = reference, variants, subject
        self._base, self._adapter = base, adapter
        self._pairs = paired(base, adapter) or [(like(row, reference.base), row) for row in adapter]
        self._few = [pair for pair in self._pairs if pair[0].question < FEW] or self._pairs
        self._way = EXACT_WAY if is_exact else ROUNDED_WAY
        self._found = apart(self._pairs, reference.base, reference.adapter)

    def suspects(self) -> list[Suspect]:
        """The nearest faults on all prompts, and then the others on the first ones, where they are further."""
        candidates = sorted(
            (self._screened(candidate) for fault in FAULTS for candidate in fault(self._subject)),
            key=lambda pair: pair[0],
        )
        found = [self._suspect(candidate) for _, candidate in candidates[:NEAREST]]
        if not any(each.explains for each in found):
            unscaled = apart(self._few, self._reference.base, self._reference.adapter)
            fitted = _fitted(lambda factor: self._screened(rescaled(self._subject, factor)), unscaled)
            found.append(self._suspect(fitted[1]))
        found.sort(key=lambda each: (not each.explains, each.rms))
        others = candidates[NEAREST:]
        return found + [Suspect(fault=c.fault, detail=c.detail, rms=far, explains=False) for far, c in others]

    def _screened(self, candidate: FaultyAdapter) -> Screened:
        expected = self._run(candidate, max(pair[0].question for pair in self._few) + 1)
        return apart(self._few, self._reference.base, expected), candidate

    def _run(self, candidate: FaultyAdapter, prompts: int | None) -> Expected:
        return self._variants.adapted(
            candidate.deltas, with_others=candidate.with_others, prompts=prompts, source=candidate.source
        )

    def _suspect(self, candidate: FaultyAdapter) -> Suspect:
        expected = self._run(candidate, None)
        rms = apart(self._pairs, self._reference.base, expected)
        explains = rms <= EXPLAINED * self._found or (rms < self._found and self._would_pass(expected))
        return Suspect(fault=candidate.fault, detail=candidate.detail, rms=rms, explains=explains)

    def _would_pass(self, expected: Expected) -> bool:
        """Whether the answers are those of this adapter, as far as noise lets one see."""
        way = strength(
            project(
                [one for one, _ in self._pairs],
                [self._change(pair) for pair in self._pairs],
                [expected.like(one) - self._reference.adapter.like(one) for one, _ in self._pairs],
            )
        )
        evidence = weigh(self._base, self._adapter, self._reference.base, expected, self._reference.sensitivity)
        half = min(float(way.half), self._way) if evidence.prompts > 1 else self._way
        return abs(float(way.value) - 1) <= max(half, self._way) and not is_further(
            evidence, self._reference.sensitivity
        )

    def _change(self, pair: tuple[Row, Row]) -> np.ndarray:
        """What sets the engine's change apart from the right adapter's."""
        one, two = pair
        effect = self._reference.adapter.like(one) - self._reference.base.like(one)
        return two.logprobs.astype(np.float64) - one.logprobs - effect


def _fitted(screened: Callable[[float], tuple[float, FaultyAdapter]], unscaled: float) -> tuple[float, FaultyAdapter]:
    """The factor on every delta_W that explains the answers best: the best of a grid, then a golden-section search.

    Args:
        screened: Distance with a factor, and the adapter with it.
        unscaled: Distance with the factor 1.
    """
    grid = {factor: screened(factor)[0] for factor in FACTORS} | {1.0: unscaled}
    best, step = math.log(min(grid, key=lambda factor: grid[factor])), math.log(FACTORS[0])
    low, high = best - step, best + step
    left, right = (screened(math.exp(side)) for side in _inner(low, high))
    for _ in range(REFINEMENTS):
        if left[0] < right[0]:
            high, right = _inner(low, high)[1], left
            left = screened(math.exp(_inner(low, high)[0]))
        else:
            low, left = _inner(low, high)[0], right
            right = screened(math.exp(_inner(low, high)[1]))
    return min(left, right, key=lambda pair: pair[0])


def _inner(low: float, high: float) -> tuple[float, float]:
    """The two inner points of an interval in the golden ratio."""
    return high - GOLDEN * (high - low), low + GOLDEN * (high - low)
