"""The verdict on an engine that a training loop samples from, by the logprobs of the sampled tokens.

Let e be the engine's logprob of a sampled token, a the trainer's with the adapter, b without, and c that of any model
that the engine could have by mistake: b itself, an earlier adapter, another one. The strength of e - c along a - c is 1
if the engine has the adapter as it is, and 0 if it has c. So c is *excluded* if the interval of this strength lies
above 1/2, and the engine is *nearer* to c than to the right adapter if it lies below.

Rounding draws the strength towards 1/2 from both sides, since a and c have noise that is in both factors. With noise n
in a and in c, a right engine has (1 + k) / 2 and a wrong one (1 - k) / 2, where

    k = 1 - 2 n^2 / rms(a - c)^2.

The judge takes for n the distance of e from a where the adapter is zero. That is the noise of both together, so k is a
lower bound. 1/2 stays the middle, so that young adapters can be judged by it; how strongly the adapter is applied is
said only where k is above RELIABLE. All arrays have to be computed in the engine's number format: one that is coarser
than the trainer's loses what a young adapter changes.

A loop is judged at each of thousands of steps. So an alarm needs ALARM times the half interval, unless one half is less
than k / 2, the distance of a right engine from 1/2, which doubles it as well.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Final, Literal, NamedTuple

from loraover.common.errors import printable
from loraover_serve.judge.case import allowed_strength, sure_errors
from loraover_serve.judge.estimates import Fit, Interval, fit_strength, share_found
from loraover_serve.judge.limits import (
    CERTAIN,
    COARSER,
    EXACT,
    EXACT_STRENGTH,
    EXPLAINED,
    FEW_AS_BASE,
    FEW_PROMPTS,
    FLOOR,
    NUMBER_FORMATS,
)
from loraover_serve.judge.names import INTERMITTENT, NOT_APPLIED, SCALED, STALE, multiplied
from loraover_serve.judge.results import LogprobDistance, Off, Suspect
from loraover_serve.judge.rules import is_narrow
from loraover_serve.judge.search import LEFT, NEARER, NEARLY, ROUNDED_WAY
from loraover_serve.rollouts.tokens import STALE_BY, Candidate, Logprobs, SampledTokens, read_tokens

RolloutVerdict = Literal["as trained", "applied, scale not known yet", "differs", "too early", "not comparable"]

HALF_WAY = 0.5
"""Strength of an engine that is as far from the right adapter as from another model."""

RELIABLE = 0.8
"""Smallest share of a change's square that has to be more than noise before the size of the change is judged."""

SAME = 1e-3
"""Share of the adapter's change by which two models may differ and be one."""

ALARM = 2.0
"""Multiple of the half interval by which a strength is off before it is an alarm."""

MIXED = "some answers are those of: {}"
"""Name of a fault that a part of the rows has."""

HALF, TWICE = "half the scale", "twice the scale"
FACTORS: Final[Mapping[str, float]] = {HALF: 0.5, TWICE: 2.0}
"""Factors on delta_W that are looked for in every loop."""


def scale_faults(scaling: float, ranks: int = 1) -> dict[str, float]:
    """Factors that an engine could put on delta_W by mistake, as `faults` of `judge_rollouts`.

    Args:
        scaling: Factor of B @ A in training: alpha / r, or alpha / sqrt(r) with rsLoRA.
        ranks: Number of processes of the trainer.
    """
    found = {"scale 1 in place of the adapter's": 1 / scaling, "the adapter's scale twice": scaling}
    return found | ({"sum over the trainer's processes": float(ranks)} if ranks > 1 else {})


@dataclass(frozen=True)
class Finding:
    """Finding about an engine that a training loop samples from."""

    verdict: RolloutVerdict | None
    """The verdict; None if nothing can be judged, for the reason given"""
    reason: str
    """The reason in words, with what is not excluded yet"""
    fault: str | None = None
    """Name of the likeliest fault; None if there is none, or if no known one explains what was found"""
    suspects: Sequence[Suspect] = ()
    """Faults that were compared, the nearest first"""
    strength: Interval | None = None
    """Strength of the adapter in the engine's logprobs, not corrected for rounding"""
    allowed: tuple[float, float] | None = None
    """Strengths that a right engine can have"""
    effect: float = 0.0
    """RMS change of the sampled tokens' logprobs by the adapter, in nats"""
    distance: float = 0.0
    """RMS difference of the engine's logprobs from the trainer's, in nats"""
    noise: float = 0.0
    """The noise that was taken: RMS difference of a right engine from the trainer, in nats"""
    reliable: float = 0.0
    """Least share of the effect's square that is more than noise; 1 without any noise"""
    tokens: int = 0
    """Number of tokens that were compared"""
    prompts: int = 0
    """Number of their prompts"""
    needed: int | None = None
    """Number of tokens like these that it takes to tell the adapter from the base model; None if it is not known"""
    excluded: Sequence[str] = ()
    """Models and factors that the engine does not have"""
    not_excluded: Sequence[str] = ()
    """Models and factors that the engine could have"""
    share: float | None = None
    """Share of the rows that have the fault; None if it is not one of some rows"""
    visible_share: float = 1.0
    """Smallest share of rows without the adapter that is seen in 99 of 100 cases"""


def judge_rollouts(
    e: Logprobs,
    a: Logprobs,
    b: Logprobs,
    prompt_ids: Sequence[Hashable],
    *,
    rows: Sequence[Hashable] | None = None,
    positions: Sequence[int] | None = None,
    earlier: Sequence[Logprobs] = (),
    faults: Mapping[str, Candidate | float] = {},
    noise: float | None = None,
    engine_prompt_ids: Sequence[Hashable] | None = None,
) -> Finding:
    """Judge whether an engine has sampled tokens from the policy that is trained.

    All arrays are flat, with one value for each sampled token; logprobs are in nats. Compute a, b, `earlier` and
    `faults` in the engine's number format.

    Args:
        e: The engine's logprobs, with which it has sampled the tokens.
        a: The trainer's logprobs with the adapter as it was when the tokens were sampled.
        b: The trainer's logprobs without the adapter.
        prompt_ids: Prompt of each token: a number, or a tuple of its token ids.
        rows: Row of each token, that is, the answer that it belongs to; by it, faults of some answers are found.
        positions: Position of each token in its row; by it, rows that are there twice are found.
        earlier: The trainer's logprobs with the adapter of one step before, of two steps before, and so on.
        faults: Logprobs of other models that the engine could have, with None at tokens for which they were not
            computed, or factors on delta_W, by name; see `scale_faults`. Half and twice are always compared.
        noise: RMS difference of e from a where the adapter was zero, in nats; None if it is not known.
        engine_prompt_ids: Prompt of each token as the engine has read it; None if it does not tell.

    Returns:
        The finding. Arrays that show nothing have no verdict, and a reason.
    """
    tokens = read_tokens(e, a, b, prompt_ids, rows, positions, earlier, faults)
    if isinstance(tokens, str):
        return Finding(None, tokens)
    if noise is not None and not (math.isfinite(noise) and noise >= 0):
        return Finding(None, f"the noise is {noise}, expected nats, or None if it is not known")
    if engine_prompt_ids is not None and (other := _other_prompts(tokens, [*engine_prompt_ids])):
        return Finding("not comparable", other)
    return judge_tokens(tokens, noise)


def _other_prompts(tokens: SampledTokens, read: Sequence[Hashable]) -> str | None:
    if len(read) != len(tokens.prompts):
        return f"engine_prompt_ids has {len(read)} values, and there are {len(tokens.prompts)} tokens"
    others = {mine for mine, its in zip(tokens.prompts, read, strict=True) if mine != its}
    if not others:
        return None
    return (
        f"the engine has read other tokens than the trainer for {len(others)} of {len({*tokens.prompts})} prompts: "
        "compare chat template, system prompt and first token; logprobs after other prompts cannot be compared"
    )


class Compared(NamedTuple):
    """A model that the engine could have, beside the right one.

    Args:
        strength: Strength of e - c along a - c: 1 if the engine is right, 0 if it has this model.
        reliable: Least share of rms(a - c)^2 that is more than noise.
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
        """Strength of the right model, or of another one, in what sets the engine apart from a model."""
        arrays = zip(self.tokens.prompts, self.tokens.engine, right or self.tokens.right, model, strict=True)
        return fit_strength([(p, (e - c) * (a - c), (a - c) ** 2) for p, e, a, c in arrays if c == c and a == a])  # type: ignore[misc]

    @cached_property
    def fitted(self) -> list[float]:
        """The model whose factor on the adapter's change explains the engine best, to first order."""
        return [b + self.along.value * (a - b) for a, b in zip(self.tokens.right, self.tokens.base, strict=True)]

    @cached_property
    def noise(self) -> float:
        """Noise that is known, or the distance that no known model explains: each row has the nearest of them."""
        if self.known_noise is not None:
            return self.known_noise
        square = self.nearest_square(self.tokens.right, self.fitted, *self.models.values())
        return math.sqrt(square / len(self.tokens.engine))

    def nearest_square(self, *models: Sequence[float]) -> float:
        """Sum of the squares of the engine's distance from models, of which each row has the nearest."""
        nearest = dict.fromkeys(self.tokens.rows, math.inf)
        for model in models:
            sums = dict.fromkeys(nearest, 0.0)
            for row, e, c in zip(self.tokens.rows, self.tokens.engine, model, strict=True):
                sums[row] += (e - c) ** 2 if c == c else math.inf
            nearest = {row: min(square, sums[row]) for row, square in nearest.items()}
        return math.fsum(nearest.values())

    def reliable(self, effect: float, noise: float | None = None) -> float:
        """Least share of the square of an effect, in nats, that is more than noise."""
        return 1 - 2 * (self.noise if noise is None else noise) ** 2 / effect**2 if effect else -math.inf

    def bounded(self, half: float, fit: Fit) -> float:
        """Half an interval; exact noise that is known, CERTAIN times and all along it, moves a strength no further."""
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
        """Largest distance from a model, in nats, that noise explains; if it is not known, half the right one's."""
        return EXPLAINED * self.distance if self.known_noise is None else COARSER * self.known_noise + FLOOR

    @cached_property
    def compared(self) -> list[Compared]:
        """Every known model that is not the right one everywhere, nor the base model under another name."""
        found = [self.compare(name, model) for name, model in self.models.items() if name not in self.twins]
        return [each for each in found if each.reliable > -math.inf]

    @cached_property
    def twins(self) -> list[str]:
        """Models that are the base model, such as an earlier adapter whose B was zero."""
        computed = {name: model for name, model in self.tokens.models.items() if any(value == value for value in model)}
        base, most = self.tokens.base, SAME * self.effect
        return [name for name, model in computed.items() if self.apart(base, model) <= most]

    @cached_property
    def reliable_size(self) -> float:
        """Least share of the adapter's change that is more than noise, if the engine's distance is noise as well."""
        return self.reliable(self.effect, max(self.noise, self.distance))

    @cached_property
    def allowed(self) -> tuple[float, float]:
        """Strengths that a right engine can have: from what rounding leaves of the adapter's change, to all of it."""
        number_format = NUMBER_FORMATS[0] if self.noise <= EXACT else None
        return allowed_strength(number_format, (1 + max(self.reliable(self.effect), 0.0)) / 2)

    def is_beyond(self) -> bool:
        """Whether the strength of the adapter is not that of a right engine."""
        if self.reliable(self.effect) < RELIABLE:
            return False
        half = self.bounded(ALARM * self.along.half if self.prompts >= FEW_PROMPTS else math.inf, self.fit)
        return self.along.value + half < self.allowed[0] or self.along.value - half > self.allowed[1]

    def is_further(self) -> bool:
        """Whether the engine is further from the trainer than its noise explains, in whichever direction."""
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
        """Rows that have a model, and rows that have the right one, of those at which this is seen."""
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


def judge_tokens(tokens: SampledTokens, noise: float | None) -> Finding:
    """Judge tokens that were checked. The first rule that finds something decides."""
    case = RolloutCase(tokens, noise)
    rules = (_some_rows_are_others, _adapter_is_beyond, _there_is_no_adapter, _it_is_too_early)
    found = next((found for rule in rules if (found := rule(case)) is not None), None) or _is_applied(case)
    excluded = [each.name for each in case.compared if each.is_excluded]
    factors = case.factors_left() if case.effect else []
    left = [each.name for each in case.compared if not each.is_excluded] + factors + case.untold()
    if found.verdict == "differs":
        left = [*found.not_excluded]
    also = f"; not excluded yet: {', '.join(left)}" if left and found.verdict is not None else ""
    return replace(
        found,
        reason=found.reason + also,
        strength=case.along if math.isfinite(case.along.half) and case.effect else None,
        allowed=case.allowed if case.effect else None,
        effect=case.effect,
        distance=case.distance,
        noise=case.noise,
        reliable=max(case.reliable(case.effect), 0.0),
        tokens=len(tokens.engine),
        prompts=case.prompts,
        excluded=[*excluded, *(name for name in case.factors if case.effect and name not in factors)],
        not_excluded=left,
        visible_share=share_found(len(case.mixed(tokens.base)[1])),
    )


def _some_rows_are_others(case: RolloutCase) -> Finding | None:
    """Rule for a mixture: a part of the rows has another model, and the others are right."""
    found = []
    for each in case.compared:
        if each.reliable >= RELIABLE:
            bad, good = case.mixed(case.models[each.name])
            if min(len(bad), len(good)) >= FEW_AS_BASE:
                found.append((case.nearest_square(case.tokens.right, case.models[each.name]), each.name, bad, good))
    if not found:
        return None
    _, name, bad, good = min(found, key=lambda one: one[0])
    fault = INTERMITTENT if name == NOT_APPLIED else MIXED.format(name)
    shown = ", ".join(printable(str(row)) for row in bad[:FEW_AS_BASE]) + (", ..." if len(bad) > FEW_AS_BASE else "")
    reason = (
        f"{fault}: {len(bad)} rows ({shown}) of {len(bad) + len(good)} at which it is seen have the logprobs of the "
        f"model *{name}*, and the others those of the right adapter: a part of the batch, or of the replicas"
    )
    return Finding("differs", reason, fault, share=len(bad) / (len(bad) + len(good)))


def _adapter_is_beyond(case: RolloutCase) -> Finding | None:
    """Rule for an engine that is nearer to another model, or has another strength, or is far off."""
    nearer = any(each.is_nearer for each in case.compared)
    if not (nearer or case.is_beyond() or case.is_further()):
        return None
    what = (
        f"the adapter has the strength {case.along} in what the engine samples, and {case.allowed[0]:.3g} to "
        f"{case.allowed[1]:.3g} is right; the engine is off by {case.distance:.2g} nats, where the adapter changes "
        f"{case.effect:.2g}"
    )
    if not (nearer or case.is_beyond()):
        what += f", more than {CERTAIN:g} times the noise of {case.noise:.2g} where the adapter was zero"
    compared = sorted(case.compared, key=lambda each: (not each.explains, each.rms))
    found = [_suspect(each) for each in compared]
    if case.effect and case.reliable(case.effect) > 0:
        fitted, nearest = _fitted(case), found[0].rms if found else math.inf
        is_first = (fitted.explains or not found or not found[0].explains) and fitted.rms < NEARER * nearest
        is_first = is_first and abs(case.along.value) > EXACT_STRENGTH  # a factor of 0 is the base model
        if is_first and found and found[0].explains:  # a factor fits noise as well: it has to exclude what explains
            is_first = case.fit_from(_model_of(case, found[0].detail), case.fitted).interval.low > HALF_WAY
        found.insert(0 if is_first else 1, fitted)
    if not found or not found[0].explains:
        also = f": the nearest, {found[0].detail}, is {found[0].rms:.2g} nats away" if found else ""
        return Finding("differs", f"{what}; no known fault explains it{also}", None, found)
    near, model = found[0], _model_of(case, found[0].detail)
    others = [
        each.detail
        for each in found[1:]
        if each.explains
        and (each.fault != SCALED or case.along.value > ROUNDED_WAY)
        and not case.fit_from(_model_of(case, each.detail), model).interval.low > HALF_WAY
    ]
    if near.fault != SCALED and case.noise > EXACT:  # rounding leaves less of a change than its factor says
        others += [f"{name} (not computed)" for name in case.factors]
    if near.fault == NOT_APPLIED:
        others += case.twins
    named = near.fault if near.detail == near.fault else f"{near.fault}: {near.detail}"
    return Finding("differs", f"{named}; {what}", near.fault, found, not_excluded=others)


def _suspect(each: Compared) -> Suspect:
    """A known model as a suspect; an earlier adapter is a stale one, and others have the names that they were given."""
    stale = STALE_BY.format("")
    return Suspect(STALE if each.name.startswith(stale) else each.name, each.name, each.rms, each.explains)


def _fitted(case: RolloutCase) -> Suspect:
    """The factor that explains the engine best, with the known factors that are as near."""
    rms = case.apart(case.tokens.engine, case.fitted)
    half = max(case.bounded(case.along.half, case.fit), LEFT * abs(case.along.value))
    names = [name for name, factor in case.factors.items() if abs(factor - case.along.value) <= half]
    value = case.along.value
    bend = abs(value * value - value) * case.effect**2  # twice a logprob's second order, half the changes' variance
    explains = rms <= max(case.limit, LEFT * case.distance, min(bend, EXPLAINED * case.distance))
    detail = multiplied(case.along.value) + (f" ({', '.join(names)})" if names else "")
    return Suspect(SCALED, detail, rms, explains)


def _model_of(case: RolloutCase, detail: str) -> list[float]:
    return case.models.get(detail, case.fitted)


def _there_is_no_adapter(case: RolloutCase) -> Finding | None:
    """Rule for an adapter that changes nothing yet: a and b are equal."""
    if case.effect:
        return None
    reason = (
        f"the adapter changes nothing yet (B = 0), so that its strength cannot be seen; the engine is off by "
        f"{case.distance:.2g} nats, which is its noise if its base model, template and temperature are right"
    )
    return Finding(None, reason)


def _it_is_too_early(case: RolloutCase) -> Finding | None:
    """Rule for an adapter that changes so little that the base model would pass as well."""
    base = next(each for each in case.compared if each.name == NOT_APPLIED)
    if base.is_excluded:
        return None
    reason = f"the adapter changes the sampled tokens by {case.effect:.2g} nats, and noise is {case.noise:.2g}"
    share = base.reliable
    if share <= 0:
        least = math.sqrt(2) * case.noise
        return Finding("too early", f"{reason}: at {least:.2g} nats and more, tokens begin to tell", needed=None)
    if not math.isfinite(case.along.half):
        return Finding("too early", f"{reason}: no error is known of so few prompts", needed=None)
    needed = math.ceil(len(case.tokens.engine) * max(1.0, (2 * case.along.half / share) ** 2))
    reason += f": about {needed} tokens like these {len(case.tokens.engine)} tell whether it is applied"
    return Finding("too early", reason, needed=needed)


def _is_applied(case: RolloutCase) -> Finding:
    """The base model is excluded: the adapter is applied, and as trained if its strength is known well enough."""
    what = (
        f"the adapter has the strength {case.along}, and {case.allowed[0]:.3g} to {case.allowed[1]:.3g} is right; the "
        f"engine is off by {case.distance:.2g} nats, where the adapter changes {case.effect:.2g}"
    )
    found = Interval.around(case.along.value, case.bounded(case.along.half, case.fit))
    is_right = found.low <= case.allowed[1] and found.high >= case.allowed[0]
    if is_right and case.reliable_size > RELIABLE and is_narrow(found, case.allowed):
        coarse = f"; rounding alone may leave {case.allowed[0]:.3g} of it" if case.noise > EXACT else ""
        return Finding("as trained", what + coarse)
    why = (
        f"noise of {max(case.noise, case.distance):.2g} nats hides its scale until it changes "
        f"{max(case.noise, case.distance) * math.sqrt(2 / (1 - RELIABLE)):.2g}"
        if case.reliable_size <= RELIABLE
        else "the interval is wide, or lies beside what is right, and more tokens decide"
    )
    return Finding("applied, scale not known yet", f"{what}; {why}")
