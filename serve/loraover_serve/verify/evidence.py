"""An engine's answers beside PyTorch, which runs the faults that the judge asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import numpy as np

from loraover.client.speaker import Response
from loraover_serve.comparison.rounding import as_served
from loraover_serve.engines.answers import ADAPTER, BASE, Expected, GreedyAnswer, Question, Row, Rows, paired
from loraover_serve.judge.case import strength_along
from loraover_serve.judge.evidence import Change, ComparedAnswer, Evidence, FaultyModel, ReadChat
from loraover_serve.judge.limits import OTHER
from loraover_serve.judge.results import Off
from loraover_serve.verify.faults import FAULTS, FaultyAdapter, RightAdapter, rescaled
from loraover_serve.verify.measures import (
    Floats,
    between_arms,
    centred,
    in_order,
    like,
    measure,
    mixed_off,
    off,
)
from loraover_serve.verify.reference import TorchReference
from loraover_serve.verify.variants import Variants

FACTORS = (32.0, 16.0, 8.0, 4.0, 2.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)


@dataclass(frozen=True)
class Answers:
    """Everything that one engine answered.

    Args:
        base: Logprobs of the base model.
        adapter: Logprobs of the adapter.
        greedy: The adapter's greedy answer to each prompt.
        mixed: Logprobs of each arm, asked for together; None if the engine takes one request at a time.
        mixed_failure: Reason why no requests were answered together; None if they were, or need not be.
        without_mixed: Whether nobody asked for any.
        is_one_model: Whether the engine has one model, so that both arms are the adapter.
        responses: Every response of a server whose logprobs were asked for; none of an engine in this process.
        chats: Chats whose tokens the server tells; None if prompts are no chats.
    """

    base: Rows
    adapter: Rows
    greedy: Sequence[GreedyAnswer]
    mixed: Mapping[str, Rows] | None = None
    mixed_failure: str | None = None
    without_mixed: bool = False
    is_one_model: bool = False
    responses: Sequence[Response] = ()
    chats: Sequence[ReadChat] | None = None


@final
class EngineEvidence(Evidence):
    """An engine's answers beside PyTorch.

    Args:
        answers: The answers.
        reference: PyTorch's.
        variants: The base model with changed adapters, to run faults.
        subject: The adapter.
    """

    factors = FACTORS

    def __init__(self, answers: Answers, reference: TorchReference, variants: Variants, subject: RightAdapter) -> None:
        self._answers, self._reference, self._variants, self._subject = answers, reference, variants, subject
        self.base, self.adapter, self.asked = reference.base, reference.adapter, len(reference.questions)
        self.sensitivity, self.ends = reference.sensitivity, reference.ends
        self.is_one_model, self.mixed_failure = answers.is_one_model, answers.mixed_failure
        self.without_mixed, self.responses, self.chats = answers.without_mixed, answers.responses, answers.chats
        self.compared = "all tokens" if answers.adapter[0].ids is None else "top tokens"
        mine = in_order(answers.adapter)
        self._rows = {ADAPTER: mine, BASE: [] if self.is_one_model else in_order(answers.base)}
        pairs = {one.place: (one, two) for one, two in paired(self._rows[BASE], mine)}
        self._pairs = [pairs.get(row.place) or (like(row, self.base), row) for row in mine]
        self._asked = self._rows[BASE] or mine

    def off(self, arm: str, model: Expected) -> list[Off]:
        return off(self._rows[arm], model)

    def changes(self, model: Expected, start: Expected) -> list[Change]:
        return between_arms(self._pairs, self.base, model, start)

    def base_changes(self, model: Expected) -> list[Change]:
        return [
            measure(row, self._off_base(row), model.like(row) - self.base.like(row))
            for row in self._rows[BASE]
            if row in model
        ]

    def _off_base(self, row: Row) -> Floats:
        found: Floats = row.logprobs - self.base.like(row)
        return found

    def base_logprobs(self) -> list[Change]:
        return [measure(row, centred(self._off_base(row)), centred(self.base.like(row))) for row in self._rows[BASE]]

    def base_repeats(self) -> list[Change]:
        return [measure(row, centred(self._off_base(row)), centred(self._lowered(row))) for row in self._rows[BASE]]

    def _lowered(self, row: Row) -> Floats:
        ids = np.arange(len(row.logprobs)) if row.ids is None else row.ids
        read = self._reference.questions[row.question].tokens[: row.position + 1]
        return np.where(np.isin(ids, read), -1.0, 0.0)

    def decoded(self) -> list[Change]:
        later = [row for answer in self._answers.greedy for row in answer.rows[1:]]
        return between_arms([(like(row, self.base), row) for row in later], self.base, self.adapter)

    def generated(self) -> Iterator[ComparedAnswer]:
        pairs = zip(self._reference.questions, self._answers.greedy, strict=True)
        return (self._beside(index, *pair) for index, pair in enumerate(pairs))

    def _beside(self, index: int, question: Question, answer: GreedyAnswer) -> ComparedAnswer:
        found = ComparedAnswer(question.continuation, answer.tokens, answer.length)
        if (parted := found.parted) is None:
            return found
        position, token = question.answered[parted], found.tokens[parted]
        logprobs = self.adapter.at(index, position)
        gap = float(logprobs[found.expected[parted]] - logprobs[token])
        return found._replace(gap=gap, is_base=token == int(self.base.at(index, position).argmax()))

    def mixed(self) -> Mapping[str, Sequence[Off]]:
        alone = {BASE: self._answers.base, ADAPTER: self._answers.adapter, OTHER: self._answers.adapter}
        return {name: mixed_off(rows, alone[name]) for name, rows in (self._answers.mixed or {}).items()}

    def rounding(self, number_format: str) -> float:
        model = self._variants.rounded(as_served(number_format, self._variants.dtype))
        squares = [float(np.mean(np.square(model.like(row) - self.base.like(row)))) for row in self._asked]
        return float(np.sqrt(np.mean(squares)))

    def bias(self, number_format: str) -> float:
        if number_format == "bf16":
            return self._reference.bias
        format_ = as_served(number_format, self._variants.dtype)
        arms = self._variants.rounded(format_), self._variants.rounded(format_, self._subject.deltas)
        pairs = [(like(row, arms[0]), like(row, arms[1])) for row in self._asked]
        return strength_along(between_arms(pairs, self.base, self.adapter)).value

    def scaled(self, factor: float, prompts: int | None = None) -> Expected:
        return self._variants.adapted(rescaled(self._subject, factor), prompts=prompts)

    def adapter_faults(self) -> Iterator[FaultyModel]:
        for fault in FAULTS:
            for each in fault(self._subject):
                yield FaultyModel(each.fault, each.detail, partial(self._run, each))

    def _run(self, faulty: FaultyAdapter, prompts: int | None) -> Expected:
        return self._variants.adapted(
            faulty.deltas,
            with_others=faulty.with_others,
            prompts=prompts,
            source=faulty.source,
            layer=faulty.layer,
        )

    def base_faults(self) -> Iterator[FaultyModel]:
        return self._variants.base_faults()

    def with_coarse_caches(self) -> Iterator[Expected]:
        return (model for _, model in self._variants.with_coarse_caches())
