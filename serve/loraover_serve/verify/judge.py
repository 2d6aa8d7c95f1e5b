"""The verdict on one engine: its answers beside PyTorch's, by the engine's own noise on the base model.

Let n be the RMS distance of the engine's base model from PyTorch's, from so many positions that its relative standard
error is s. The adapter's distance may be

    allowed = sensitivity * n * (1 + k * sqrt(2) * s) + FLOOR,

since it is an estimate with the same relative error, and rounding moves the adapted model by `sensitivity` more. k is
SURE, or, since s is estimated from the same positions, the quantile of Student's t that chance exceeds once in 10,000
cases if that is larger: below 16 positions.
A larger distance *differs*. A smaller one is *as trained* if the adapter moves logprobs by more than APPLIED times
that, so that an adapter at two thirds of its strength would be seen, and *inconclusive* otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from loraover.common.errors import EngineError
from loraover_serve.comparison.rounding import FORMATS
from loraover_serve.comparison.thresholds import APPLIED, SURE
from loraover_serve.engines.answers import ADAPTER, BASE, Expected, Rows
from loraover_serve.verify.faults import FAULTS, IN_BASE, OTHER_BASE, FaultyAdapter, RightAdapter, rescaled
from loraover_serve.verify.mixed import compare_mixed, mixed_fault
from loraover_serve.verify.reference import Reference
from loraover_serve.verify.report import EngineResult, Greedy, LogprobDistance, Suspect
from loraover_serve.verify.variants import Variants

FLOOR = 1e-4  # nats by which float32's rounding alone may set apart two computations
EXACT = 10 * FLOOR  # noise below which the engine computes in float32
COARSER = 2  # times the distance of a number format, up to which noise is that format's
EXPLAINED = 0.1  # share of the adapter's distance that may remain if a fault explains it
BY_CHANCE = 1e-4  # probability of a distance that the noise is taken not to explain
FEW_POSITIONS = 30  # with fewer, their own error makes the allowed distance clearly larger
FEW, NEAREST = 3, 4  # prompts on which every fault is run, and faults that are run on all prompts
FACTORS = (2.0, 4.0, 8.0, 16.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
GOLDEN, REFINEMENTS = (math.sqrt(5) - 1) / 2, 8


@dataclass(frozen=True)
class Answers:
    """Everything that one engine answered.

    Args:
        base: logprobs of the base model.
        adapter: logprobs of the adapter.
        greedy: tokens of the adapter's greedy answer to each prompt.
        mixed: logprobs of each arm, asked for together; None if the engine takes one request at a time.
        unmixed: reason why the requests that were sent together failed; None if they did not.
    """

    base: Rows
    adapter: Rows
    greedy: Sequence[tuple[int, ...]]
    mixed: Mapping[str, Rows] | None = None
    unmixed: str | None = None


@dataclass(frozen=True)
class Court:
    """What engines are judged by.

    Args:
        reference: PyTorch's answers.
        variants: the base model with changed adapters, to run suspected faults.
        subject: the adapter.
    """

    reference: Reference
    variants: Variants
    subject: RightAdapter

    def judge(self, engine: str, version: str | None, answers: Answers, seconds: float) -> EngineResult:
        """Compare an engine's answers with PyTorch's, and look for a fault if they differ.

        Args:
            engine: name of the engine.
            version: its version; None if it reports none.
            answers: its answers.
            seconds: time that they took.

        Raises:
            EngineError: answers that are not finite, or of another vocabulary.
        """
        reference = self.reference
        for rows in (answers.base, answers.adapter, *(answers.mixed or {}).values()):
            _check(engine, rows, reference.base.vocabulary)
        _check_tokens(engine, answers.greedy, reference.base.vocabulary)
        noise = distance(answers.base, reference.base)
        found = distance(answers.adapter, reference.adapter)
        allowed = allowed_distance(noise, reference.sensitivity)
        greedy = _greedy(answers.greedy, reference, 2 * reference.sensitivity * noise.largest + FLOOR)
        effect = between(answers.adapter, reference.adapter, reference.base)
        apart = {BASE: answers.base, ADAPTER: answers.adapter}
        mixed = None if answers.mixed is None else compare_mixed(answers.mixed, apart)
        facts = {
            "engine": engine,
            "version": version,
            "compared": "all tokens" if answers.base[0].ids is None else "top tokens",
            "base": noise,
            "adapter": found,
            "effect": effect,
            "allowed": allowed,
            "greedy": greedy,
            "mixed": mixed,
            "unmixed": answers.unmixed,
            "seconds": seconds,
        }
        leak = distance(answers.base, reference.adapter).rms
        if leak < noise.rms / 2 and noise.rms > EXACT:
            reason = (
                "requests for the base model are answered with the adapter; those for the adapter are "
                f"{found.rms:.2g} nats from PyTorch's answers"
            )
            return EngineResult(verdict="differs", reason=reason, fault=IN_BASE, **facts)
        number_format = self._number_format(answers.base, noise)
        facts["number_format"] = number_format
        if number_format is None:
            reason = (
                f"the base model is off by {noise.rms:.2g} nats without an adapter, more than weights rounded to 4 "
                "bits would be: the engine serves another base model"
            )
            return EngineResult(verdict="differs", reason=reason, fault=OTHER_BASE, **facts)
        if found.rms <= allowed:
            within = _within(found, noise, effect, allowed, greedy, number_format)
            if within["verdict"] != "differs" and mixed is not None:
                within = mixed_fault(mixed, allowed) or within
            if answers.unmixed is not None:
                within["reason"] += f"; mixed batches were not compared: {answers.unmixed}"
            return EngineResult(**within, **facts)
        suspects = self._suspects(answers.adapter, found, allowed)
        nearest = suspects[0]
        reason = _named(suspects, allowed) if nearest.explains else _unexplained(nearest, found, allowed)
        fault = nearest.fault if nearest.explains else None
        return EngineResult(verdict="differs", reason=reason, fault=fault, suspects=suspects, **facts)

    def _number_format(self, rows: Rows, noise: LogprobDistance) -> str | None:
        """The finest number format whose rounding moves the base model about as far; None if none does."""
        if noise.rms <= EXACT:
            return "fp32"
        for name, format_ in FORMATS.items():
            if noise.rms <= COARSER * between(rows, self.variants.rounded(format_), self.reference.base):
                return name
        return None

    def _suspects(self, rows: Rows, found: LogprobDistance, allowed: float) -> list[Suspect]:
        """The nearest faults on all prompts, and then the others on the first ones, where they are further."""
        few = [row for row in rows if row.question < FEW]

        def rms(candidate: FaultyAdapter, rows: Rows, prompts: int | None) -> float:
            expected = self.variants.adapted(candidate.deltas, with_others=candidate.with_others, prompts=prompts)
            return distance(rows, expected).rms

        def screened(candidate: FaultyAdapter) -> tuple[float, FaultyAdapter]:
            return rms(candidate, few, FEW), candidate

        def nearest(candidates: Sequence[tuple[float, FaultyAdapter]]) -> list[Suspect]:
            return [_suspect(each, rms(each, rows, None), found, allowed) for _, each in candidates]

        candidates = sorted(map(screened, self._candidates()), key=lambda pair: pair[0])
        suspects = nearest(candidates[:NEAREST])
        if all(each.rms > allowed for each in suspects):
            unscaled = distance(few, self.reference.adapter).rms
            suspects += nearest([_fitted(lambda factor: screened(rescaled(self.subject, factor)), unscaled)])
        suspects.sort(key=lambda each: each.rms)
        return suspects + [_suspect(each, far, found, allowed) for far, each in candidates[NEAREST:]]

    def _candidates(self) -> list[FaultyAdapter]:
        return [candidate for fault in FAULTS for candidate in fault(self.subject)]


def distance(rows: Rows, expected: Expected) -> LogprobDistance:
    """Distance of logprobs from PyTorch's, with the standard error over positions.

    Args:
        rows: an engine's logprobs.
        expected: PyTorch's.
    """
    return LogprobDistance.of([row.logprobs - expected.like(row) for row in rows])


def between(rows: Rows, one: Expected, other: Expected) -> float:
    """RMS difference of two models' logprobs in PyTorch, in nats, of the tokens and positions that an engine gave."""
    squares = [float(np.mean(np.square(one.like(row) - other.like(row)))) for row in rows]
    return math.sqrt(np.mean(squares))


def allowed_distance(noise: LogprobDistance, sensitivity: float) -> float:
    """Largest distance of the adapter, in nats, that the noise explains; see the head of this module."""
    relative = noise.error / noise.rms if noise.rms else 0.0
    return sensitivity * noise.rms * (1 + sure_errors(noise.positions) * math.sqrt(2) * relative) + FLOOR


def sure_errors(positions: int) -> float:
    """Standard errors by which an estimate may be off if its error is estimated from so many positions.

    Two positions have one degree of freedom; a single one is treated like two.
    """
    return max(SURE, float(stats.t.isf(BY_CHANCE, max(positions - 1, 1))))


def _check(engine: str, rows: Rows, vocabulary: int) -> None:
    for row in rows:
        if not np.isfinite(row.logprobs).all():
            raise EngineError(f"{engine}: a logprob is not a finite number.")
        if row.ids is not None and row.ids.min() < 0:
            raise EngineError(f"{engine}: answers with a token of a negative id, {row.ids.min()}.")
        size = len(row.logprobs) if row.ids is None else int(row.ids.max()) + 1
        if size > vocabulary or (row.ids is None and size < vocabulary):
            raise EngineError(
                f"{engine}: answers with {size} tokens or more, and the base model has {vocabulary}; it serves another "
                "model. Name the base model with --model."
            )


def _check_tokens(engine: str, answers: Sequence[tuple[int, ...]], vocabulary: int) -> None:
    unknown = [token for tokens in answers for token in tokens if not 0 <= token < vocabulary]
    if unknown:
        raise EngineError(
            f"{engine}: generates the token {unknown[0]}, and the base model has {vocabulary}; it serves another "
            "model. Name the base model with --model."
        )


def _greedy(found: Sequence[tuple[int, ...]], reference: Reference, allowed: float) -> Greedy | None:
    """Greedy answers beside PyTorch's; those of which the engine identifies no token are left out."""
    gaps, equal = [], 0
    for index, (question, tokens) in enumerate(zip(reference.questions, found, strict=True)):
        pairs = enumerate(zip(question.continuation, tokens, strict=False))
        parted = next((i for i, (expected, token) in pairs if expected != token), None)
        if parted is not None:
            logprobs = reference.adapter.at(index, question.answered[parted])
            gaps.append(float(logprobs[question.continuation[parted]] - logprobs[tokens[parted]]))
        elif tokens:
            gaps.append(0.0)
            equal += _is_complete(tokens, question.continuation, reference.ends)
    return Greedy(equal=equal / len(gaps), gap=max(gaps), allowed=allowed) if gaps else None


def _is_complete(tokens: tuple[int, ...], expected: tuple[int, ...], ends: AbstractSet[int]) -> bool:
    """Whether the beginning of the expected answer is all of it, or all before the end of the text.

    Servers stop at the end of the text, which PyTorch's answers continue, and return its token or leave it out.
    """
    return len(tokens) >= len(expected) or tokens[-1] in ends or expected[len(tokens)] in ends


def _within(
    found: LogprobDistance,
    noise: LogprobDistance,
    effect: float,
    allowed: float,
    greedy: Greedy | None,
    number_format: str,
) -> dict[str, Any]:
    """Verdict and reason if the adapter's logprobs are within noise."""
    if greedy is not None and greedy.gap > greedy.allowed:
        reason = (
            f"logprobs agree, but a greedy answer leaves PyTorch's where the two tokens are {greedy.gap:.2g} nats "
            f"apart, and noise explains {greedy.allowed:.2g}: the engine generates other tokens than it scores"
        )
        return {"verdict": "differs", "reason": reason}
    if effect <= APPLIED * allowed:
        reason = (
            f"the adapter moves logprobs by {effect:.2g} nats, and differences up to {allowed:.2g} are noise on this "
            "engine; a wrong adapter would pass as well"
        )
        if noise.positions < FEW_POSITIONS:
            reason += f"; {noise.positions} positions are few: give more prompts or a larger --new-tokens"
        return {"verdict": "inconclusive", "reason": reason}
    coarse = "" if number_format == "fp32" else f", as much as {number_format} arithmetic would"
    hidden = "; generated answers were not compared, since the engine returns no token ids" if greedy is None else ""
    reason = (
        f"off by {found.rms:.2g} nats, where the adapter moves logprobs by {effect:.2g} and the engine's base model is "
        f"off by {noise.rms:.2g}{coarse}{hidden}"
    )
    return {"verdict": "as trained", "reason": reason}


def _named(suspects: Sequence[Suspect], allowed: float) -> str:
    nearest = suspects[0]
    others = [each.detail for each in suspects[1:] if each.rms <= allowed]
    text = f"{nearest.fault}: {nearest.detail} (that is {nearest.rms:.2g} nats from the engine's answers)"
    return text + (f"; within noise it could also be: {'; '.join(others)}" if others else "")


def _unexplained(nearest: Suspect, found: LogprobDistance, allowed: float) -> str:
    return (
        f"off by {found.rms:.2g} nats, where noise explains {allowed:.2g}, and no known fault explains it; the nearest "
        f"is {nearest.fault} ({nearest.detail}), {nearest.rms:.2g} nats from the engine's answers"
    )


def _suspect(candidate: FaultyAdapter, rms: float, found: LogprobDistance, allowed: float) -> Suspect:
    explains = rms <= max(allowed, EXPLAINED * found.rms)
    return Suspect(fault=candidate.fault, detail=candidate.detail, rms=rms, explains=explains)


def _fitted(screened: Callable[[float], tuple[float, FaultyAdapter]], unscaled: float) -> tuple[float, FaultyAdapter]:
    """The factor on every delta_W that explains the answers best: the best of a grid, then a golden-section search.

    Args:
        screened: distance with a factor, and the adapter with it.
        unscaled: distance with the factor 1.
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
