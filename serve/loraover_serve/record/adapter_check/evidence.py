"""A server's answers beside recorded models: plain dictionaries of logprobs by token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple, final

from loraover.client.speaker import Response
from loraover.common.errors import EngineError
from loraover_serve.judge.evidence import Change, ComparedAnswer, Evidence, FaultyModel, ReadChat, Repeat
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.names import COARSE_CACHE
from loraover_serve.judge.results import Off
from loraover_serve.record.adapter_check.reference import Model, Reference, Row, Rows

FACTORS = (1 / 16, 1 / 8)
"""Factors that are tried beside the recorded ones: between those and none, answers are interpolated."""


class Greedy(NamedTuple):
    """A greedy answer.

    Args:
        question: Index of the question.
        tokens: Its tokens, up to the first unknown one.
        length: Its number of tokens.
        rows: Its logprobs, as far as its tokens are PyTorch's.
    """

    question: int
    tokens: Sequence[int]
    length: int
    rows: Rows


class AskedOnce(NamedTuple):
    """Answers of a model at places, each of which was asked for once.

    Args:
        rows: Their logprobs.
        told: Headers of each response, and its id.
    """

    rows: Rows
    told: Mapping[int, Mapping[str, str]]


@dataclass
class ServerAnswers:
    """Answers of a server.

    Args:
        base: Logprobs of the base model.
        adapter: Logprobs of the adapter.
        greedy: The adapter's greedy answers.
        mixed: Logprobs of each arm, asked for beside those of another model.
        rounds: The adapter's answers to the same questions, asked again and again; the first are `adapter`.
        is_one_model: Whether the server has one model under both names.
        mixed_failure: Reason why mixed batches were not answered; None if they were, or need not be.
        without_mixed: Whether nobody asked for mixed batches.
        responses: Every response whose logprobs were asked for.
        chats: Chats whose tokens the server tells; None if prompts are no chats.
    """

    base: Rows
    adapter: Rows
    greedy: Sequence[Greedy] = ()
    mixed: Mapping[str, Rows] = field(default_factory=dict)
    rounds: Sequence[AskedOnce] = ()
    is_one_model: bool = False
    mixed_failure: str | None = None
    without_mixed: bool = False
    responses: Sequence[Response] = ()
    chats: Sequence[ReadChat] | None = None


@final
class RecordedEvidence(Evidence):
    """A server's answers beside recorded models.

    Args:
        reference: The reference.
        answers: The answers.

    Raises:
        EngineError: Answers of another vocabulary.
    """

    compared = "top tokens"

    def __init__(self, reference: Reference, answers: ServerAnswers) -> None:
        self._reference, self._answers = reference, answers
        self.base, self.adapter, self.asked = reference.base, reference.adapter, len(reference.questions)
        self.sensitivity, self.ends = reference.sensitivity, reference.ends
        self.is_one_model, self.mixed_failure = answers.is_one_model, answers.mixed_failure
        self.without_mixed, self.responses, self.chats = answers.without_mixed, answers.responses, answers.chats
        self._scaled = sorted(
            [(0.0, self.base), (1.0, self.adapter)]
            + [(each.factor, each) for each in reference.variants[ADAPTER] if each.factor is not None],
            key=lambda pair: pair[0],
        )
        self.factors = (*FACTORS, *(factor for factor, _ in self._scaled if factor))
        self._pairs = self._paired_or_beside(answers.adapter)
        if not self._pairs:
            raise EngineError("the server answers with none of the recorded tokens; it serves another base model.")

    def off(self, arm: str, model: Model) -> list[Off]:
        rows = self._answers.adapter if arm == ADAPTER else self._answers.base
        return [self._off(p, model.off(p, row)) for p, row in sorted(rows.items()) if p < len(model.rows)]

    def changes(self, model: Model, start: Model) -> list[Change]:
        return self._along(self._pairs, model, start)

    def repeated(self) -> list[Repeat]:
        places = {place for one in self._answers.rounds for place in one.rows}
        return [each for place in sorted(places) for each in self._repeated(place)]

    def _repeated(self, place: int) -> list[Repeat]:
        found = [(one.rows[place], one.told[place]) for one in self._answers.rounds if place in one.rows]
        nearest = min(
            (row for row, _ in found), key=lambda row: fmean(map(abs, self.adapter.off(place, row))), default={}
        )
        repeats = []
        for row, told in found:
            for change in self._along(self._paired_or_beside({place: row}), self.adapter, self.base):
                apart = None if row is nearest else math.sqrt(fmean(d * d for d in _difference(row, nearest)))
                repeats.append(Repeat(change._replace(source=told), apart))
        return repeats

    def base_changes(self, model: Model) -> list[Change]:
        return self._along(self._beside_base(self._answers.base), model, self.base)

    def base_logprobs(self) -> list[Change]:
        return self._centred({place: self.base.rows[place] for place in self._answers.base})

    def base_repeats(self) -> list[Change]:
        read = {place: {*self._reference.read(place)} for place in self._answers.base}
        return self._centred({p: {i: -float(i in read[p]) for i in self.base.rows[p]} for p in self._answers.base})

    def decoded(self) -> list[Change]:
        later = {
            place: row
            for answer in self._answers.greedy
            for place, row in answer.rows.items()
            if place > self._reference.first(answer.question)
        }
        return self._along(self._beside_base(later), self.adapter, self.base)

    def generated(self) -> Iterable[ComparedAnswer]:
        return map(self._beside, self._answers.greedy)

    def mixed(self) -> Mapping[str, Sequence[Off]]:
        found = {}
        for name, rows in self._answers.mixed.items():
            alone = self._answers.base if name == BASE else self._answers.adapter
            pairs = ((place, row, alone[place]) for place, row in sorted(rows.items()) if place in alone)
            found[name] = [self._off(place, _difference(row, other)) for place, row, other in pairs]
        return found

    def rounding(self, number_format: str) -> float:
        return self._reference.formats[number_format]["distance"]

    def bias(self, number_format: str) -> float:
        return self._reference.formats[number_format]["strength"]

    def scaled(self, factor: float, prompts: int | None = None) -> Model:
        """The parabola through the three recorded factors that are nearest, at this one or the outermost one."""
        factor = min(max(factor, self._scaled[0][0]), self._scaled[-1][0])
        inner = range(1, len(self._scaled) - 1)
        middle = min(inner, key=lambda index: abs(self._scaled[index][0] - factor), default=1)  # of two, a line
        near = self._scaled[middle - 1 : middle + 2]
        weights = [math.prod((factor - other) / (one - other) for other, _ in near if other != one) for one, _ in near]
        rows = [
            {i: sum(weight * row[i] for weight, row in zip(weights, rows, strict=True)) for i in rows[0]}
            for rows in zip(*(model.rows for _, model in near), strict=False)
        ]
        return Model(rows, [0.0] * len(rows))

    def adapter_faults(self) -> Iterable[FaultyModel]:
        return (_candidate(model) for model in self._reference.variants[ADAPTER] if model.factor is None)

    def base_faults(self) -> Iterable[FaultyModel]:
        return (_candidate(model) for model in self._reference.variants[BASE] if model.fault != COARSE_CACHE)

    def with_coarse_caches(self) -> Iterable[Model]:
        return (model for model in self._reference.variants[BASE] if model.fault == COARSE_CACHE)

    def _prompt(self, place: int) -> int:
        return self._reference.places[place][0]

    def _off(self, place: int, differences: Sequence[float]) -> Off:
        return Off(self._prompt(place), fmean(d * d for d in differences), max(map(abs, differences)))

    def _paired(self, rows: Rows, others: Rows) -> list[Pair]:
        """Places and tokens that two sets of rows share, with what sets their logprobs apart."""
        known = {
            p: [i for i in rows[p] if i in others[p] and i in self.base.rows[p]] for p in sorted(rows) if p in others
        }
        return [(p, ids, [rows[p][i] - others[p][i] for i in ids]) for p, ids in known.items() if ids]

    def _paired_or_beside(self, rows: Rows) -> list[Pair]:
        """The adapter's rows beside the base model's; where these have none of its tokens, beside the recorded ones."""
        pairs = self._paired(rows, self._answers.base)
        known = {place for place, _, _ in pairs}
        return sorted(pairs + self._beside_base({place: row for place, row in rows.items() if place not in known}))

    def _beside_base(self, rows: Rows) -> list[Pair]:
        return self._paired(rows, dict(enumerate(self.base.rows)))

    def _along(self, pairs: Iterable[Pair], model: Model, start: Model) -> list[Change]:
        """Changes beyond what `start` changes, along what leads from there to a model, where both were run."""
        found = []
        for place, ids, values in pairs:
            if place < min(len(model.rows), len(start.rows)):
                mine, begin, base = model.rows[place], start.rows[place], self.base.rows[place]
                change = [value - (begin[i] - base[i]) for i, value in zip(ids, values, strict=True)]
                found.append(self._measure(place, change, [mine[i] - begin[i] for i in ids]))
        return found

    def _centred(self, ways: Rows) -> list[Change]:
        return [
            self._measure(place, _centred(values), _centred([ways[place][i] for i in ids]))
            for place, ids, values in self._beside_base(self._answers.base)
        ]

    def _measure(self, place: int, change: Sequence[float], direction: Sequence[float]) -> Change:
        rest = [one - other for one, other in zip(change, direction, strict=True)]
        along = math.fsum(one * other for one, other in zip(change, direction, strict=True))
        size, total, far = (math.fsum(value * value for value in each) for each in (direction, change, rest))
        return Change(self._prompt(place), len(change), along, size, total, far)

    def _beside(self, answer: Greedy) -> ComparedAnswer:
        found = ComparedAnswer(self._reference.questions[answer.question]["answer"], answer.tokens, answer.length)
        if (parted := found.parted) is None:
            return found
        place, token = self._reference.first(answer.question) + parted, found.tokens[parted]
        row, floor, base = self.adapter.rows[place], self.adapter.floors[place], self.base.rows[place]
        gap = row.get(found.expected[parted], floor) - row.get(token, floor)
        return found._replace(gap=gap, is_base=token == max(base, key=base.__getitem__))


Pair = tuple[int, list[int], list[float]]
"""A place, tokens that both sides have, and what sets their logprobs apart."""


def _candidate(model: Model) -> FaultyModel:
    return FaultyModel(model.fault, model.detail, lambda prompts: model)


def _difference(row: Row, other: Row) -> list[float]:
    """Differences of two rows' logprobs, of the tokens that both have.

    If they share none, the likeliest token of one has at most the other's smallest logprob.
    """
    return [row[i] - other[i] for i in row if i in other] or [max(row.values()) - min(other.values())]


def _centred(values: Sequence[float]) -> list[float]:
    mean = fmean(values)
    return [value - mean for value in values]
