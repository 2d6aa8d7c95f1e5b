"""An engine's answers compared with models: the changes and distances by which the judge decides.

A change is a difference of logprobs at one place, of the tokens that both sides have there. PyTorch's models have every
token that an engine gives. Those of a reference have the likeliest tokens, and an upper bound for all others.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from operator import mul
from statistics import fmean, median_low
from typing import NamedTuple, final

from loraover.common.errors import EngineError
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.models import Answers, Model, Models, Row, Rows
from loraover_serve.judge.results import Off


class Change(NamedTuple):
    """A change at one position, along a direction.

    Args:
        prompt: Index of the prompt.
        tokens: Number of tokens whose logprobs are compared.
        along: Product of the change and the direction, in square nats.
        size: Square of the direction.
        total: Square of the change.
        rest: Square of the difference between the change and the direction.
        source: Headers and id of the response; only the changes of `Evidence.repeats` have them.
    """

    prompt: int
    tokens: int
    along: float
    size: float
    total: float
    rest: float
    source: Mapping[str, str] = {}


class Repeat(NamedTuple):
    """Answer of the adapter at a position, to a question that may have been asked several times.

    Args:
        change: Change that the answer shows, along the change by the right adapter.
        apart: RMS difference, in nats, from the best answer to the same question, which is the nearest to the right
            adapter's; None for the best answer itself.
    """

    change: Change
    apart: float | None


class ComparedAnswer(NamedTuple):
    """A greedy answer beside PyTorch's.

    Args:
        expected: PyTorch's tokens.
        tokens: The engine's tokens, up to the first that it does not identify.
        length: Number of the engine's tokens.
        gap: Logprob of PyTorch's token minus that of the engine's, in nats, where the answer first differs.
        is_base: Whether the other token is the likeliest of the base model.
    """

    expected: Sequence[int]
    tokens: Sequence[int]
    length: int
    gap: float = 0.0
    is_base: bool = False

    @property
    def parted(self) -> int | None:
        """Index of the first token that is not PyTorch's; None if there is none."""
        pairs = enumerate(zip(self.expected, self.tokens, strict=False))
        return next((index for index, (one, other) in pairs if one != other), None)

    def is_complete(self, ends: AbstractSet[int]) -> bool:
        """Whether the tokens are the whole expected answer, or all of it before the token that ends the text.

        Some servers return the token that ends the text, and others leave it out.

        Args:
            ends: Ids of the tokens that end a text.
        """
        tokens, expected = self.tokens, self.expected
        return self.length >= len(expected) or tokens[-1] in ends or expected[len(tokens)] in ends


Pair = tuple[int, list[int], list[float]]
"""A place, the tokens that both sides have there, and the differences of their logprobs."""


@final
class Evidence:
    """Answers of an engine, and the models to compare them with.

    Attributes:
        compared: Which tokens are compared, in words.

    Raises:
        EngineError: Answers of another vocabulary.
    """

    def __init__(self, models: Models, answers: Answers) -> None:
        self.models, self.answers = models.beside(answers), answers
        self.base, self.adapter = self.models.base, self.models.adapter
        is_all = all(len(row) == models.vocabulary for row in answers.adapter.values())
        self.compared = "all tokens" if is_all else "top tokens"
        self._pairs = self._paired_or_beside(answers.adapter)
        if not self._pairs:
            raise EngineError("the server answers with none of the recorded tokens; it serves another base model.")

    def off(self, arm: str, model: Model) -> list[Off]:
        """Return the differences of an arm's answers from a model's, where the model was run."""
        rows = self.answers.adapter if arm == ADAPTER else self.answers.base
        return [self._off(p, model.off(p, row)) for p, row in sorted(rows.items()) if p < len(model.rows)]

    def changes(self, model: Model, start: Model) -> list[Change]:
        """Project what the engine's adapter changes beyond `start` on the direction from `start` to the model.

        The changes are in the order of the places; a model that was run on a few prompts has only the first ones.
        """
        return self._along(self._pairs, model, start)

    @cached_property
    def repeats(self) -> list[Repeat]:
        """Every answer of the adapter to the questions; empty if no question was asked in every round."""
        repeats = []
        for place in sorted({place for one in self.answers.rounds for place in one.rows}):
            found = [(one.rows[place], one.told[place]) for one in self.answers.rounds if place in one.rows]
            nearest = min((row for row, _ in found), key=lambda row: fmean(map(abs, self.adapter.off(place, row))))
            for row, told in found:
                for change in self._along(self._paired_or_beside({place: row}), self.adapter, self.base):
                    apart = None if row is nearest else math.sqrt(fmean(d * d for d in difference(row, nearest)))
                    repeats.append(Repeat(change._replace(source=told), apart))
        return repeats

    def base_changes(self, model: Model) -> list[Change]:
        """Project the error of the engine's base model on the difference of the model from the right base model."""
        return self._along(self._beside_base(self.answers.base), model, self.base)

    def base_logprobs(self) -> list[Change]:
        """Project the error of the engine's base model on the logprobs themselves, both without their means."""
        return self._centred({place: self.base.rows[place] for place in self.answers.base})

    def base_repeats(self) -> list[Change]:
        """Project the base model's error on a lowering of the tokens already read, both without their means."""
        read = {place: {*self.models.read(place)} for place in self.answers.base}
        return self._centred({p: {i: -float(i in read[p]) for i in self.base.rows[p]} for p in self.answers.base})

    def decoded(self) -> list[Change]:
        """Return the base model's changes at the tokens of the adapter's greedy answers, from the second token on."""
        later = {
            place: row
            for answer in self.answers.greedy
            for place, row in answer.rows.items()
            if self.models.places[place][1] > 0
        }
        return self._along(self._beside_base(later), self.adapter, self.base)

    def generated(self) -> list[ComparedAnswer]:
        """The adapter's greedy answers."""
        compared = []
        for answer in self.answers.greedy:
            found = ComparedAnswer(self.models.questions[answer.question].answer, answer.tokens, answer.length)
            if (parted := found.parted) is not None:
                place, token = self.models.first(answer.question) + parted, found.tokens[parted]
                row, floor, base = self.adapter.rows[place], self.adapter.floors[place], self.base.rows[place]
                gap = row.get(found.expected[parted], floor) - row.get(token, floor)
                found = found._replace(gap=gap, is_base=token == max(base, key=base.__getitem__))
            compared.append(found)
        return compared

    @cached_property
    def mixed(self) -> Mapping[str, Sequence[Off]]:
        """Differences of answers in mixed batches from answers of the same arm alone; empty without mixed batches."""
        found = {}
        for name, rows in self.answers.mixed.items():
            alone = self.answers.base if name == BASE else self.answers.adapter
            pairs = ((place, row, alone[place]) for place, row in sorted(rows.items()) if place in alone)
            found[name] = [self._off(place, difference(row, other)) for place, row, other in pairs]
        return found

    def _off(self, place: int, differences: Sequence[float]) -> Off:
        square = fmean(d * d for d in differences)
        return Off(self.models.places[place][0], square, max(map(abs, differences)))

    def _paired(self, rows: Rows, others: Rows) -> list[Pair]:
        """Places and tokens that two sets of rows share, with the differences of their logprobs."""
        known = {
            p: [i for i in rows[p] if i in others[p] and i in self.base.rows[p]] for p in sorted(rows) if p in others
        }
        return [(p, ids, [rows[p][i] - others[p][i] for i in ids]) for p, ids in known.items() if ids]

    def _paired_or_beside(self, rows: Rows) -> list[Pair]:
        """The adapter's rows minus the engine's base model's, or minus PyTorch's where they share no token."""
        pairs = self._paired(rows, self.answers.base)
        known = {place for place, _, _ in pairs}
        return sorted(pairs + self._beside_base({place: row for place, row in rows.items() if place not in known}))

    def _beside_base(self, rows: Rows) -> list[Pair]:
        return self._paired(rows, {place: self.base.rows[place] for place in rows})

    def _along(self, pairs: Iterable[Pair], model: Model, start: Model) -> list[Change]:
        """Project the differences from `start` on the way from `start` to a model, where both were run."""
        found = []
        for place, ids, values in pairs:
            if place < min(len(model.rows), len(start.rows)):
                mine, begin, base = model.rows[place], start.rows[place], self.base.rows[place]
                change = [value - (begin[i] - base[i]) for i, value in zip(ids, values, strict=True)]
                found.append(projected(self.models.places[place][0], change, [mine[i] - begin[i] for i in ids]))
        return found

    def _centred(self, ways: Rows) -> list[Change]:
        return [
            projected(self.models.places[place][0], _centred(values), _centred([ways[place][i] for i in ids]))
            for place, ids, values in self._beside_base(self.answers.base)
        ]


def projected(prompt: int, change: Sequence[float], direction: Sequence[float]) -> Change:
    """Project a change of logprobs at a place on a direction; both have the same tokens.

    Args:
        prompt: Index of the prompt.
        change: The change, in nats.
        direction: The direction, in nats.
    """
    rest = [one - other for one, other in zip(change, direction, strict=True)]
    along = math.fsum(map(mul, change, direction))
    size, total, far = (math.fsum(map(mul, each, each)) for each in (direction, change, rest))
    return Change(prompt, len(change), along, size, total, far)


def difference(row: Row, other: Row) -> list[float]:
    """Differences of two rows' logprobs, of the tokens that both have.

    If they share none, the likeliest token of each row counts as having the smallest logprob of the other row.
    """
    return [row[i] - other[i] for i in row if i in other] or [max(row.values()) - min(other.values())]


def _centred(values: Sequence[float]) -> list[float]:
    mean = fmean(values)
    return [value - mean for value in values]


def apart(changes: Sequence[Change]) -> float:
    """RMS distance of changes from their directions, in nats; infinite if there are none."""
    return math.sqrt(fmean(each.rest / each.tokens for each in changes)) if changes else math.inf


def by_prompt(found: Sequence[Off]) -> dict[int, float]:
    """RMS difference of each prompt, in nats."""
    return {prompt: math.sqrt(fmean(mine)) for prompt, mine in _squares(found).items()}


def middle_by_prompt(found: Sequence[Off]) -> dict[int, float]:
    """Median difference over each prompt's positions, in nats, which a few odd positions do not move."""
    return {prompt: math.sqrt(median_low(mine)) for prompt, mine in _squares(found).items()}


def _squares(found: Sequence[Off]) -> Mapping[int, list[float]]:
    squares = defaultdict[int, list[float]](list)
    for each in found:
        squares[each.prompt].append(each.square)
    return squares
