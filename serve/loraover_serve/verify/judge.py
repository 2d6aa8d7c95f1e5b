"""The verdict on one engine, from its answers beside PyTorch's: the first rule that finds something decides.

1. Requests for the base model are answered with the adapter, or the base model has a fault that points in a direction.
2. The base model is further off than any number format explains: another base model.
3. Some answers are the base model's.
4. The adapter's strength, or its excess, is beyond what is allowed: a fault of the adapter, which PyTorch looks for.
5. Generated answers end early, lack the adapter, or have other tokens than the logprobs; or mixed batches do.
6. *As trained*, if the interval of the strength is narrow and the number format is one that was asked for;
   *inconclusive* otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from loraover.common.errors import EngineError
from loraover.common.request import as_written
from loraover_serve.comparison.rounding import FORMATS
from loraover_serve.engines.answers import ADAPTER, BASE, GreedyAnswer, Rows
from loraover_serve.verify.base_faults import find_base_fault
from loraover_serve.verify.decoded import compare_greedy, decoded_fault
from loraover_serve.verify.evidence import EXACT, FLOOR, Evidence, between, like, weigh
from loraover_serve.verify.faults import INTERMITTENT, OTHER_BASE, UNLIKE, RightAdapter
from loraover_serve.verify.mixed import compare_mixed, mixed_fault
from loraover_serve.verify.reference import Reference
from loraover_serve.verify.report import EngineResult, GreedyAgreement, Interval, MixedBatch
from loraover_serve.verify.request import NUMBER_FORMATS, VerifyRequest
from loraover_serve.verify.rules import (
    RuleFinding,
    allowed_distance,
    allowed_strength,
    beyond,
    is_narrow,
    is_nearer,
    shown,
)
from loraover_serve.verify.strength import between_arms, strength
from loraover_serve.verify.suspects import Search
from loraover_serve.verify.variants import Variants

COARSER = 2  # times the distance of a number format, up to which noise is that format's
ENOUGH = 32  # prompts that decide on an engine in bfloat16
FEW_AS_BASE = 3  # answers of the base model that chance alone does not make
PLAIN = ("fp32", "fp16", "bf16")
"""Number formats in which models are published; weights are off by chance in the coarser ones, and so in others."""


@dataclass(frozen=True)
class Answers:
    """Everything that one engine answered.

    Args:
        base: Logprobs of the base model.
        adapter: Logprobs of the adapter.
        greedy: The adapter's greedy answer to each prompt.
        mixed: Logprobs of each arm, asked for together; None if the engine takes one request at a time.
        mixed_failure: Reason why the requests that were sent together failed; None if they did not.
    """

    base: Rows
    adapter: Rows
    greedy: Sequence[GreedyAnswer]
    mixed: Mapping[str, Rows] | None = None
    mixed_failure: str | None = None


@dataclass(frozen=True)
class EngineJudge:
    """What engines are judged by.

    Args:
        reference: PyTorch's answers.
        variants: The base model with changed adapters, to run suspected faults.
        subject: The adapter.
        number_format: Coarsest number format in which the base model is known to be served.
    """

    reference: Reference
    variants: Variants
    subject: RightAdapter
    number_format: str = "bf16"

    def judge(self, engine: str, version: str | None, answers: Answers, seconds: float) -> EngineResult:
        """Compare an engine's answers with PyTorch's, and look for a fault if they differ.

        Args:
            engine: Name of the engine.
            version: Its version; None if it reports none.
            answers: Its answers.
            seconds: Time that they took.

        Raises:
            EngineError: Answers that are not finite, or of another vocabulary.
        """
        _check(engine, answers, self.reference.base.vocabulary)
        case = EngineCase(self, answers)
        finding = next(found for rule in RULES if (found := rule(case)) is not None)
        mixed_failure = (
            f"; mixed batches were not compared: {answers.mixed_failure}" if answers.mixed_failure is not None else ""
        )
        evidence = case.evidence
        return EngineResult(
            engine=engine,
            version=version,
            verdict=finding.verdict,
            reason=finding.reason + mixed_failure,
            fault=finding.fault,
            compared="all tokens" if answers.base[0].ids is None else "top tokens",
            strength=Interval.of(evidence.strength) if evidence.effect > 0 else None,
            allowed_strength=case.allowed,
            base=evidence.noise,
            number_format=case.number_format,
            adapter=evidence.found,
            effect=evidence.effect,
            allowed=case.limit,
            greedy=case.greedy,
            mixed=case.mixed,
            mixed_failure=answers.mixed_failure,
            suspects=list(finding.suspects),
            seconds=seconds,
        )


class EngineCase:
    """One engine's answers, with what the rules ask of them.

    Args:
        judge: What the engine is judged by.
        answers: Its answers.
    """

    def __init__(self, judge: EngineJudge, answers: Answers) -> None:
        self.judge, self.answers, self.reference = judge, answers, judge.reference

    @cached_property
    def evidence(self) -> Evidence:
        """Strength, excess and distances."""
        return weigh(
            self.answers.base,
            self.answers.adapter,
            self.reference.base,
            self.reference.adapter,
            self.reference.sensitivity,
        )

    @cached_property
    def number_format(self) -> str | None:
        """The finest number format whose rounding moves the base model about as far; None if none does."""
        noise = self.evidence.noise.rms
        if noise <= EXACT:
            return "fp32"
        for name, format_ in FORMATS.items():
            rounded = between(self.answers.base, self.judge.variants.rounded(format_), self.reference.base)
            if noise <= COARSER * rounded:
                return name
        return None

    @property
    def allowed(self) -> tuple[float, float]:
        """Strengths that a right adapter has."""
        return allowed_strength(self.number_format, self._bias)

    @cached_property
    def _bias(self) -> float:
        """Strength of the right adapter if PyTorch computes in the number format of the base model."""
        if self.number_format is None or self.number_format in PLAIN:
            return self.reference.bias
        format_, variants = FORMATS[self.number_format], self.judge.variants
        rounded = (variants.rounded(format_), variants.rounded(format_, self.judge.subject.deltas))
        pairs = [tuple(like(row, each) for each in rounded) for row in self.answers.base]
        found = strength(between_arms([(one, two) for one, two in pairs], self.reference.base, self.reference.adapter))
        return float(found.value) or 1.0

    @property
    def limit(self) -> float:
        """Largest distance of a single computation that noise explains, in nats."""
        return allowed_distance(self.evidence.noise, self.reference.sensitivity)

    @cached_property
    def greedy(self) -> GreedyAgreement | None:
        """Greedy answers beside PyTorch's."""
        gap = 2 * self.reference.sensitivity * self.evidence.noise.largest + FLOOR
        return compare_greedy(self.answers.greedy, self.reference, gap)

    @cached_property
    def mixed(self) -> MixedBatch | None:
        """Answers in mixed batches."""
        apart = {BASE: self.answers.base, ADAPTER: self.answers.adapter}
        return None if self.answers.mixed is None else compare_mixed(self.answers.mixed, apart)


def base_is_faulty(case: EngineCase) -> RuleFinding | None:
    """What sets the base model apart points in the direction of a fault."""
    if case.evidence.noise.rms <= EXACT:
        return None
    judge, thorough = case.judge, case.number_format not in PLAIN
    found = find_base_fault(
        case.answers.base,
        case.reference.base,
        case.reference.adapter,
        case.reference.questions,
        judge.variants,
        judge.subject,
        thorough=thorough,
    )
    if found is None:
        return None
    reason = (
        f"{found.fault}: {found.detail}, which explains {found.share:.0%} of what sets the base model apart from "
        f"PyTorch's ({case.evidence.noise.rms:.2g} nats)"
    )
    return RuleFinding("differs", reason, found.fault)


def base_is_another(case: EngineCase) -> RuleFinding | None:
    """No number format is as far off as the base model."""
    if case.number_format is not None:
        return None
    reason = (
        f"the base model is off by {case.evidence.noise.rms:.2g} nats without an adapter, more than weights rounded to "
        "4 bits would be: the engine serves another base model"
    )
    return RuleFinding("differs", reason, OTHER_BASE)


def base_is_unlike(case: EngineCase) -> RuleFinding | None:
    """The adapter's answers are nearer to PyTorch's than noise as large as the base model's allows."""
    found = case.evidence
    if not is_nearer(found, case.reference.sensitivity):
        return None
    reason = (
        f"the adapter's answers are off by {found.found.rms:.2g} nats, those for the base model by "
        f"{found.noise.rms:.2g}: requests for the base model are answered by something else"
    )
    return RuleFinding("differs", reason, UNLIKE)


def some_are_base(case: EngineCase) -> RuleFinding | None:
    """Some of the adapter's answers are the base model's, and others are not."""
    found = case.evidence
    if not FEW_AS_BASE <= found.as_base <= found.clear - FEW_AS_BASE:
        return None
    part = found.as_base / found.clear
    reason = f"{found.as_base} of {found.clear} answers of the adapter ({part:.0%}) are the base model's"
    return RuleFinding("differs", reason, INTERMITTENT)


def adapter_is_beyond(case: EngineCase) -> RuleFinding | None:
    """The strength or the distance is not that of a right adapter."""
    found = beyond(case.evidence, case.allowed, case.reference.sensitivity)
    if found is None:
        return None
    judge, answers = case.judge, case.answers
    exact = case.number_format == "fp32"
    search = Search(case.reference, judge.variants, judge.subject, answers.base, answers.adapter, is_exact=exact)
    suspects = search.suspects()
    nearest = suspects[0]
    if not nearest.explains:
        reason = f"{found}; no known fault explains it: the nearest, {nearest.fault} ({nearest.detail}), is off by "
        return RuleFinding("differs", f"{reason}{nearest.rms:.2g} nats", None, suspects)
    others = [each.detail for each in suspects[1:] if each.explains]
    also = f"; within noise it could also be: {'; '.join(others)}" if others else ""
    reason = f"{nearest.fault}: {nearest.detail} ({found}; with this fault {nearest.rms:.2g} nats remain){also}"
    return RuleFinding("differs", reason, nearest.fault, suspects)


def generated_is_wrong(case: EngineCase) -> RuleFinding | None:
    """Generated answers are not what the logprobs say."""
    return decoded_fault(case.greedy, case.answers.greedy, case.reference)


def mixed_is_wrong(case: EngineCase) -> RuleFinding | None:
    """Answers change beside requests for another model."""
    return None if case.mixed is None else mixed_fault(case.mixed, case.limit)


def strength_is_unclear(case: EngineCase) -> RuleFinding | None:
    """The interval of the strength is wide, or there is no effect to see."""
    found = case.evidence
    if found.effect > FLOOR and is_narrow(found.strength, case.allowed):
        return None
    reason = (
        f"the adapter moves logprobs by {found.effect:.2g} nats, and the engine's noise is {found.noise.rms:.2g}: its "
        f"strength is {shown(found.strength)}, and a wrong adapter would pass as well"
    )
    if found.prompts < ENOUGH:
        reason += f"; {found.prompts} prompts are few: give {ENOUGH} or more"
    return RuleFinding("inconclusive", reason)


def format_is_undeclared(case: EngineCase) -> RuleFinding | None:
    """The base model is coarser than was declared, and so may be another one."""
    assert case.number_format is not None
    if NUMBER_FORMATS.index(case.number_format) <= NUMBER_FORMATS.index(case.judge.number_format):
        return None
    reason = (
        f"the adapter has the strength {shown(case.evidence.strength)}, but the base model is off by "
        f"{case.evidence.noise.rms:.2g} nats, as {case.number_format} would be, or another base model; if it is served "
        f"in {case.number_format}, say so with {VerifyRequest.named('served_format')}"
    )
    return RuleFinding("inconclusive", reason)


def as_trained(case: EngineCase) -> RuleFinding:
    """No rule found anything."""
    found = case.evidence
    coarse = "" if case.number_format == "fp32" else f", as {case.number_format} arithmetic would be"
    hidden = (
        "; generated answers were not compared, since the engine returns no token ids" if case.greedy is None else ""
    )
    reason = (
        f"the adapter has the strength {shown(found.strength)}; off by {found.found.rms:.2g} nats, where it moves "
        f"logprobs by {found.effect:.2g} and the engine's base model is off by {found.noise.rms:.2g}{coarse}{hidden}"
    )
    return RuleFinding("as trained", reason)


RULES: tuple[Callable[[EngineCase], RuleFinding | None], ...] = (
    base_is_faulty,
    base_is_another,
    base_is_unlike,
    some_are_base,
    adapter_is_beyond,
    generated_is_wrong,
    mixed_is_wrong,
    strength_is_unclear,
    format_is_undeclared,
    as_trained,
)
"""The rules in their order; the last always finds something."""


def _check(engine: str, answers: Answers, vocabulary: int) -> None:
    for rows in (answers.base, answers.adapter, *(answers.mixed or {}).values()):
        _check_rows(engine, rows, vocabulary)
    unknown = [token for answer in answers.greedy for token in answer.tokens if not 0 <= token < vocabulary]
    if unknown:
        raise EngineError(
            f"{engine}: generates the token {unknown[0]}, and the base model has {vocabulary}; it serves another "
            f"model. Name the base model with {as_written('model')}."
        )


def _check_rows(engine: str, rows: Rows, vocabulary: int) -> None:
    for row in rows:
        if not np.isfinite(row.logprobs).all():
            raise EngineError(f"{engine}: a logprob is not a finite number.")
        if row.ids is not None and row.ids.min() < 0:
            raise EngineError(f"{engine}: answers with a token of a negative id, {row.ids.min()}.")
        size = len(row.logprobs) if row.ids is None else int(row.ids.max()) + 1
        if size > vocabulary or (row.ids is None and size < vocabulary):
            raise EngineError(
                f"{engine}: answers with {size} tokens or more, and the base model has {vocabulary}; it serves another "
                f"model. Name the base model with {as_written('model')}."
            )
