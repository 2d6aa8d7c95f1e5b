"""The model that gave each answer, on a server whose adapters come and go while it is asked.

First, each model answers all questions alone. Let y be the difference of an answer from the one that the asked model
gave alone, and d that of another known model: another one that is served, or the same weights on keys and values of
other weights. The answer is attributed to the other model if y is nearer to d than to 0 along d, and if d is so long
that the noise along it, by the median of all answers, hardly reaches half of it. The answer is of no known weights if
it is further from all models than noise explains.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, median_low
from typing import NamedTuple

from loraover.client.speaker import Response
from loraover_serve.judge.estimates import TO_SIGMA, share_found, share_interval
from loraover_serve.judge.evidence import Change, by_prompt, difference, projected
from loraover_serve.judge.fleet import from_cache
from loraover_serve.judge.limits import BASE, CERTAIN, CLEAR, FEW_AS_BASE, FLOOR, OTHER
from loraover_serve.judge.models import Models, Row, Rows
from loraover_serve.judge.names import CACHE_OF_RESPONSES, CROSSED, NO_KNOWN_WEIGHTS, STALE
from loraover_serve.judge.results import ChurnAnswers, LogprobDistance, Off
from loraover_serve.judge.search import LEFT
from loraover_serve.judge.warm_probe import Asked


class Said(NamedTuple):
    """An answer during the churn.

    Args:
        arm: The model that was asked.
        place: Place of the question.
        rows: The logprobs, up to the first token that is not the expected one.
        seconds: Seconds that it took.
    """

    arm: str
    place: int
    rows: Rows
    seconds: float
    response: Response


@dataclass(frozen=True)
class Owner:
    """Model that gave an answer.

    Args:
        words: The model, in words that follow a number of answers.
        fault: Name of the fault; None for a right answer, or if the command may have loaded this model.
        key: Name of the model among those of an arm.
        rows: Its answers on the server, as far as they are known.
    """

    words: str
    fault: str | None = None
    key: str = ""
    rows: Rows = field(default_factory=dict, compare=False, repr=False)


OWN = Owner("of the asked model")


class Attributed(NamedTuple):
    """Answers of one model in churn.

    Args:
        shown: The answers as verify.json has them.
        questions: Number of questions with wrong answers.
        fault: Name of the fault; None without wrong answers.
        unseen: Kinds of wrong answers that would not have been seen, in words.
        wrong: Numbers of wrong answers by the models that gave them, in words.
    """

    shown: ChurnAnswers
    questions: int
    fault: str | None
    unseen: Sequence[str]
    wrong: Mapping[str, int]


class ChurnCase:
    """Answers in churn, compared with the answers of each model alone."""

    def __init__(
        self,
        models: Models,
        names: Mapping[str, str],
        cold: Mapping[str, Asked],
        noise: Asked,
        said: Sequence[Said],
    ) -> None:
        self._models, self._names, self._said = models, names, said
        self._cold = {arm: each.rows for arm, each in cold.items()}
        self.is_cached = from_cache([each.response for each in said])
        self._noise_rows, alone = noise.rows, self._off(BASE, noise.rows)
        self.noise, self._by_prompt = LogprobDistance.of(alone), by_prompt(alone)
        self._offs = [self._off(each.arm, each.rows) for each in said]
        compared = [i for i, off in enumerate(self._offs) if off]
        self._of = {arm: [i for i in compared if said[i].arm == arm] for arm in names}
        self._changes = {arm: {o: self._changed(arm, o) for o in self._known(arm)} for arm in names}
        self._busy = self._noise_in_churn()

    @staticmethod
    def has_loaded(found: Sequence[Attributed]) -> bool:
        """Whether some answers are of another model than the asked one, so that the command has loaded something."""
        return any(set(each.shown.owners) - {OWN.words} for each in found)

    def attributed(self, arm: str, absent: int) -> Attributed:
        """Attribute the answers of a model.

        Args:
            arm: The model.
            absent: Number of requests that the server refused, since the model was not loaded.
        """
        changes, clear = self._changes[arm], self._clear_of(arm)
        found: list[Owner] = []
        # The command may load versions of another adapter that no reference has.
        unknown = Owner("of no known weights", None if arm.startswith(OTHER) else NO_KNOWN_WEIGHTS)
        for k, i in enumerate(self._of[arm]):
            prompt = self._models.places[self._said[i].place][0]
            noise = max(self.noise.rms, self._busy, self._by_prompt.get(prompt, 0.0))
            limit = CERTAIN * (self._models.sensitivity * noise + FLOOR)
            near = [o for o, each in changes.items() if each[k].along > each[k].size / 2]
            nearest = min(near, key=lambda o: _apart(changes[o][k]), default=OWN)
            each = None if nearest is OWN else changes[nearest][k]
            fits = each is not None and _apart(each) <= limit + LEFT * math.sqrt(each.size / each.tokens)
            if fits and clear[nearest][k]:
                found.append(nearest)
            else:  # an answer that is nearest to an innocent model is right, though noise may hide which one it is of
                is_right = (fits and nearest.fault is None) or self._middle(i) <= limit
                found.append(OWN if is_right else unknown)
        seen = {o: sum(c and f in (OWN, o) for c, f in zip(clear[o], found, strict=True)) for o in changes}
        visible = {o: share_found(number) for o, number in seen.items() if o.fault is not None}
        return self._counted(arm, found, visible, absent)

    def _clear_of(self, arm: str) -> dict[Owner, list[bool]]:
        """For each known model, whether each answer can be told apart: is it that model's, or a right one?

        Right models are the asked one and those that the command may have loaded.
        """
        changes, clear = self._changes[arm], dict[Owner, list[bool]]()
        for owner, each in changes.items():
            # median noise of answers along the way to the owner, in nats
            far = [min(abs(c.along), abs(c.size - c.along)) / math.sqrt(c.size) for c in each if c.size > 0]
            scale = TO_SIGMA * median(far) if far else math.inf
            ways = [(each, self._common(arm, owner))]
            if owner.fault is not None:
                innocent = [o for o in changes if o.fault is None]
                ways += [(self._changed(arm, owner, o), self._common(arm, owner, o)) for o in innocent]
            clear[owner] = [
                all(along) for along in zip(*(self._clear(way, max(scale, least)) for way, least in ways), strict=True)
            ]
        return clear

    def _clear(self, changes: Sequence[Change], noise: float) -> list[bool]:
        """Whether each answer can be told apart: noise hardly reaches half of the way from one model to another.

        The noise is in nats; a question's own noise takes its place where it is larger.
        """
        own = [self._models.sensitivity * self._by_prompt.get(each.prompt, 0.0) for each in changes]
        return [math.sqrt(c.size) / 2 > CLEAR * max(noise, mine) for c, mine in zip(changes, own, strict=True)]

    def _common(self, arm: str, owner: Owner, start: Owner = OWN) -> float:
        """Noise, in nats, along the way between two models that all questions share by their common beginning."""
        along = dict[int, list[float]]()
        for place, row in self._noise_rows.items():
            right, (own, other) = self._cold[BASE].get(place, {}), self._ends(arm, place, owner, start)
            ids = [i for i in row if i in right and i in own and i in other]
            if ids:
                way = projected(place, [row[i] - right[i] for i in ids], [other[i] - own[i] for i in ids])
                sums = along.setdefault(self._models.places[place][0], [0.0, 0.0])
                sums[0], sums[1] = sums[0] + way.along, sums[1] + way.size
        squares = [product * product / size for product, size in along.values() if size > 0]
        common = math.sqrt(fmean(squares)) if squares else 0.0
        return self._models.sensitivity * max(self.noise.rms, common) + FLOOR

    def _ends(self, arm: str, place: int, owner: Owner, start: Owner) -> tuple[Row, Row]:
        """Logprobs at a place by two models: the one where a way starts, and the one to which it leads."""
        return (self._cold[arm] if start is OWN else start.rows).get(place, {}), owner.rows.get(place, {})

    def _counted(self, arm: str, found: Sequence[Owner], visible: Mapping[Owner, float], absent: int) -> Attributed:
        said = [self._said[i] for i in self._of[arm]]
        wrong = [i for i, owner in zip(self._of[arm], found, strict=True) if owner.fault is not None]
        times = sorted(each.seconds for each in said)
        shown = ChurnAnswers(
            self._names[arm],
            len(said),
            dict(Counter(owner.words for owner in found).most_common()),
            len(wrong),
            share_interval(len(wrong), len(said)),
            {owner.words: least for owner, least in visible.items()},
            absent,
            (median(times), times[math.ceil(0.99 * len(times)) - 1]) if times else None,
        )
        faults = Counter(owner.fault for owner in found if owner.fault is not None)
        fault = max(faults, key=lambda name: (name != NO_KNOWN_WEIGHTS, faults[name]), default=None)
        if sum(self.is_cached[i] for i in wrong) >= FEW_AS_BASE:
            fault = CACHE_OF_RESPONSES
        unseen = [owner.words for owner, least in visible.items() if least >= 1]
        owners = Counter(owner.words for owner in found if owner.fault is not None)
        return Attributed(shown, len({self._said[i].place for i in wrong}), fault, unseen, owners)

    def _known(self, arm: str) -> Iterator[Owner]:
        """Yield the models that may have given an answer of an arm, except those that answer like its own model."""
        own, found = self._cold[arm], list[Owner]()
        for other, rows in self._cold.items():
            if other != arm:
                name = self._names.get(other, "the base model")
                found.append(Owner(f"of {name}", CROSSED, other, rows))
        right = self._models.base if arm == BASE else self._models.adapter
        for model in self._models.recorded(arm):
            rows = {}
            for place, row in own.items():
                stale = model.rows[place]
                rows[place] = {i: value + stale[i] - right.rows[place][i] for i, value in row.items() if i in stale}
            is_earlier = model.fault == STALE
            words = "of its earlier version" if is_earlier else f"of a {model.fault}"
            found.append(Owner(words, None if is_earlier else model.fault, model.fault, rows))
        return (each for each in found if LogprobDistance.of(self._off(arm, each.rows)).rms > FLOOR)

    def _noise_in_churn(self) -> float:
        """Usual distance of answers in churn from the nearest known model, in nats.

        The smallest of all arms' medians is taken, since all answers of an arm may be wrong. It is at most sqrt(2)
        times the distance of the server's base model from PyTorch's.
        """
        found = []
        for arm, mine in self._of.items():
            changes = self._changes[arm].values()
            far = [min([self._middle(i), *(_apart(each[k]) for each in changes)]) for k, i in enumerate(mine)]
            found += [median(far)] if len(far) >= FEW_AS_BASE else []
        if self._models.base.rows:
            off = self._off(BASE, {place: self._models.base.rows[place] for place in self._cold[BASE]})
            found.append(math.sqrt(2) * LogprobDistance.of(off).rms)
        return min(found, default=0.0)

    def _off(self, arm: str, rows: Rows) -> list[Off]:
        """Differences of rows from a model's own."""
        found = []
        for place, row in sorted(rows.items()):
            if row and place in self._cold[arm]:
                off = difference(row, self._cold[arm][place])
                found.append(Off(self._models.places[place][0], fmean([d * d for d in off]), max(map(abs, off))))
        return found

    def _middle(self, index: int) -> float:
        """Median distance over positions, in nats, of an answer from the one that its model gave alone."""
        return math.sqrt(median_low(each.square for each in self._offs[index]))

    def _changed(self, arm: str, owner: Owner, start: Owner = OWN) -> list[Change]:
        """Project the difference of each answer from one model's on the difference of another model's from that."""
        found = []
        for said in (self._said[i] for i in self._of[arm]):
            y, d = list[float](), list[float]()
            for place, row in sorted(said.rows.items()):
                own, other = self._ends(arm, place, owner, start)
                ids = [i for i in row if i in own and i in other]
                y += [row[i] - own[i] for i in ids]
                d += [other[i] - own[i] for i in ids]
            found.append(projected(self._models.places[said.place][0], y, d))
        return found


def _apart(change: Change) -> float:
    """RMS distance of an answer from another model's, in nats; infinite if they share no token."""
    return math.sqrt(change.rest / change.tokens) if change.tokens else math.inf
