"""The verdict on an engine that a training loop samples from, by the logprobs of the sampled tokens.

`case` has the estimates, and the rules of `judge_tokens` decide by them. The first rule that finds something decides.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Unpack

from loraover.common.errors import printable
from loraover_serve.judge.estimates import Interval, share_found
from loraover_serve.judge.limits import EXACT, EXACT_STRENGTH, EXPLAINED, FEW_AS_BASE, FLOOR
from loraover_serve.judge.names import INTERMITTENT, NOT_APPLIED, SCALED, STALE, multiplied
from loraover_serve.judge.results import Suspect
from loraover_serve.judge.rules import is_narrow
from loraover_serve.judge.search import LEFT, NEARER, ROUNDED_WAY
from loraover_serve.rollouts.case import HALF_WAY, RELIABLE, RolloutCase
from loraover_serve.rollouts.tokens import STALE_BY, Logprobs, SampledTokens, TokenFacts, read_tokens

RolloutVerdict = Literal["as trained", "applied, scale not known yet", "differs", "too early", "not comparable"]

NOT_EXCLUDED = "not excluded yet"
"""Title of the list of models and factors that an engine could have."""

MIXED = "some answers are those of: {}"
"""Name of a fault that a part of the rows has."""


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
    """The reason, in a sentence; `not_excluded` belongs below it"""
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
    """RMS difference of a right engine from the trainer, in nats, as given, learned or estimated"""
    reliable: float = 0.0
    """Smallest share of the effect's square that cannot be noise; 1 without any noise"""
    tokens: int = 0
    """Number of tokens that were compared"""
    prompts: int = 0
    """Number of prompts that they belong to"""
    needed: int | None = None
    """Number of tokens like these that would show whether the adapter is applied; None if it is not known"""
    excluded: Sequence[str] = ()
    """Models and factors that the engine does not have"""
    not_excluded: Sequence[str] = ()
    """Models and factors that the engine could have"""
    share: float | None = None
    """Share of the rows that have the fault; None if not just some rows have it"""
    visible_share: float = 1.0
    """Smallest share of rows without the adapter that would be seen in 99 of 100 cases"""

    @property
    def in_a_line(self) -> str:
        """The reason, and what is not excluded yet."""
        return self.reason + (f"; {NOT_EXCLUDED}: {', '.join(self.not_excluded)}" if self.not_excluded else "")


def judge_rollouts(
    e: Logprobs,
    a: Logprobs,
    b: Logprobs,
    prompt_ids: Sequence[Hashable],
    *,
    noise: float | None = None,
    **facts: Unpack[TokenFacts],
) -> Finding:
    """Judge whether an engine has sampled tokens from the policy that is trained.

    All arrays are flat, with one value for each sampled token; logprobs are in nats. Compute a, b, `earlier` and
    `faults` in the engine's number format.

    Args:
        e: The engine's logprobs, with which it has sampled the tokens.
        a: The trainer's logprobs with the adapter as it was when the tokens were sampled.
        b: The trainer's logprobs without the adapter.
        prompt_ids: Prompt of each token: a number, or a tuple of its token ids.
        noise: RMS difference of e from a where the adapter was zero, in nats; None if it is not known.
        **facts: Further facts of the tokens, such as `rows`; see `TokenFacts`.

    Returns:
        The finding. Arrays that show nothing have no verdict, and a reason.
    """
    tokens = read_step(e, a, b, prompt_ids, facts)
    if isinstance(tokens, Finding):
        return tokens
    if noise is not None and not (math.isfinite(noise) and noise >= 0):
        return Finding(None, f"the noise is {noise}, expected nats, or None if it is not known")
    return judge_tokens(tokens, noise)


def read_step(
    e: Logprobs, a: Logprobs, b: Logprobs, prompt_ids: Sequence[Hashable], facts: TokenFacts
) -> SampledTokens | Finding:
    """Check arrays of tokens; of those that cannot be judged, the finding says why. Arguments: `judge_rollouts`."""
    tokens, read = read_tokens(e, a, b, prompt_ids, facts), facts.get("engine_prompt_ids")
    if isinstance(tokens, str):
        return Finding(None, tokens)
    if read is not None and (other := _other_prompts(tokens, [*read])):
        return Finding("not comparable", other)
    return tokens


def _other_prompts(tokens: SampledTokens, read: Sequence[Hashable]) -> str | None:
    if len(read) != len(tokens.prompts):
        return f"engine_prompt_ids has {len(read)} values, expected one for each of {len(tokens.prompts)} tokens"
    others = {mine for mine, its in zip(tokens.prompts, read, strict=True) if mine != its}
    if not others:
        return None
    return (
        f"the engine has read other tokens than the trainer for {len(others)} of {len({*tokens.prompts})} prompts, "
        "so their logprobs cannot be compared: make sure that it has the trainer's chat template, system prompt and "
        "first "
        "token"
    )


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
    return replace(
        found,
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
    """Rule for mixtures: some rows have another model, and the others are right."""
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
        f"{fault}: {len(bad)} of {len(bad) + len(good)} rows ({shown}) have the logprobs of the model *{name}*, and "
        "the others are right"
    )
    return Finding("differs", reason, fault, share=len(bad) / (len(bad) + len(good)))


def _adapter_is_beyond(case: RolloutCase) -> Finding | None:
    """Rule for an engine that is nearer to another model, or has another strength, or is far off."""
    nearer = any(each.is_nearer for each in case.compared)
    if not (nearer or case.is_beyond() or case.is_further()):
        return None
    what = _applied(case)
    if not (nearer or case.is_beyond()):
        what = (
            f"the engine's logprobs are {case.distance / (case.noise or FLOOR):.2g} times as far off as noise explains"
        )
    compared = sorted(case.compared, key=lambda each: (not each.explains, each.rms))
    stale = STALE_BY.format("")
    found = [
        Suspect(STALE if each.name.startswith(stale) else each.name, each.name, each.rms, each.explains)
        for each in compared
    ]
    if case.effect and case.reliable(case.effect) > 0:
        fitted, nearest = _fitted(case), found[0].rms if found else math.inf
        is_first = (fitted.explains or not found or not found[0].explains) and fitted.rms < NEARER * nearest
        is_first = is_first and abs(case.along.value) > EXACT_STRENGTH  # a factor of 0 is the base model
        if is_first and found and found[0].explains:  # a factor fits noise as well: it has to exclude what explains
            is_first = case.fit_from(_model_of(case, found[0].detail), case.fitted).interval.low > HALF_WAY
        found.insert(0 if is_first else 1, fitted)
    if not found or not found[0].explains:
        return Finding("differs", f"{what}, and no known fault explains it", None, found)
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
    named = f"{near.fault}: " if near.detail == near.fault else f"{near.fault}: {near.detail}, so that "
    return Finding("differs", named + what, near.fault, found, not_excluded=others)


def _fitted(case: RolloutCase) -> Suspect:
    """The factor that explains the engine best, as a suspect, with the known factors that its interval includes."""
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
    return Finding(None, "the adapter changes nothing yet (B = 0), so it cannot be seen whether the engine has it")


def _it_is_too_early(case: RolloutCase) -> Finding | None:
    """Rule for an adapter that changes so little that the base model would pass as well."""
    base = next(each for each in case.compared if each.name == NOT_APPLIED)
    if base.is_excluded:
        return None
    share = base.reliable
    if share <= 0:
        reason = (
            "the adapter changes the sampled tokens less than noise does: only later steps can show whether it is "
            "applied"
        )
        return Finding("too early", reason, needed=None)
    if not math.isfinite(case.along.half):
        reason = "these are too few prompts to see whether the adapter is applied"
        return Finding("too early", reason, needed=None)
    tokens = len(case.tokens.engine)
    needed = math.ceil(tokens * max(1.0, (2 * case.along.half / share) ** 2))
    reason = f"{tokens} tokens do not show yet whether the adapter is applied, and about {needed} like these would"
    return Finding("too early", reason, needed=needed)


def _is_applied(case: RolloutCase) -> Finding:
    """The base model is excluded, so the adapter is applied; it is as trained if its strength is known well enough."""
    found = Interval.around(case.along.value, case.bounded(case.along.half, case.fit))
    is_right = found.low <= case.allowed[1] and found.high >= case.allowed[0]
    if is_right and case.reliable_size > RELIABLE and is_narrow(found, case.allowed):
        return Finding("as trained", _applied(case))
    why = "more tokens will decide"
    if case.reliable_size <= RELIABLE:
        why = "it changes the sampled tokens too little beside the noise"
    return Finding("applied, scale not known yet", f"the adapter is applied, but not yet known how strongly: {why}")


def _applied(case: RolloutCase) -> str:
    """How much of the adapter is applied, and how much is right, in a sentence."""
    return case.along.beside(case.allowed, " in what the engine samples")
