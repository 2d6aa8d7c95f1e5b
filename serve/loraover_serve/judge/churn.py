"""Answers of a server whose adapters come and go while it is asked, each with the model that it is of.

Before that, each model answers all questions by itself. Let y be what sets an answer apart from its model's own, and d
what sets another known model apart from it: another one that is served, or the same weights on keys and values of
others. The answer is of that model if y is nearer to d than to 0 along d, and d is so long that noise along it, by the
median of all answers, hardly reaches half of it. It is of no known weights if it is further off than noise explains.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import fmean, median, median_low
from threading import Event, Thread
from typing import NamedTuple

from loraover.client.at_once import AT_ONCE
from loraover.client.endpoint import AbsentError, Endpoint, UnansweredError, UnfitRequestError, is_same_model
from loraover.client.speaker import Response
from loraover.common.errors import EngineError
from loraover_serve.judge.asker import Asker
from loraover_serve.judge.caches import Asked, Probe
from loraover_serve.judge.estimates import TO_SIGMA, share_found, share_interval
from loraover_serve.judge.evidence import Change, by_prompt, difference, projected
from loraover_serve.judge.fleet import from_cache
from loraover_serve.judge.limits import ADAPTER, BASE, CERTAIN, CLEAR, FEW_AS_BASE, FLOOR, OTHER
from loraover_serve.judge.models import Models, Rows
from loraover_serve.judge.names import CACHE_OF_RESPONSES, CROSSED, NO_KNOWN_WEIGHTS, SERVER_ENDED, STALE
from loraover_serve.judge.results import Churn, ChurnAnswers, LogprobDistance, Off
from loraover_serve.judge.search import LEFT
from loraover_serve.judge.user_command import UserCommand

MOST_OTHERS = 8
"""Further adapters on the server that are asked at most."""

ABSENT_PAUSE_S, LIFE_S = 0.02, 15.0  # after a refusal of a model that is just not loaded; for a sign of life


class ChurnRequest(NamedTuple):
    """Questions to ask while adapters come and go.

    Args:
        questions: The questions: long ones, if there are any, show stale caches.
        seconds: Seconds for which they are asked.
        command: Command that runs meanwhile; None if there is none.
    """

    questions: Models
    seconds: float
    command: UserCommand | None = None


class Said(NamedTuple):
    """An answer during the churn.

    Args:
        arm: The model that was asked.
        place: Place of the question.
        rows: The logprobs, as far as the tokens are the expected ones.
        seconds: Seconds that it took.
        response: The response.
    """

    arm: str
    place: int
    rows: Rows
    seconds: float
    response: Response


@dataclass(frozen=True)
class Owner:
    """Model that an answer is of.

    Args:
        words: Whose answers these are, in words.
        fault: Name of the fault; None if there is none, or the command may have loaded this model.
        key: Name of the model among those of an arm.
        rows: Its answers on the server, as far as they are known.
    """

    words: str
    fault: str | None = None
    key: str = ""
    rows: Rows = field(default_factory=dict, compare=False, repr=False)


OWN = Owner("of the asked model")


class Meanwhile(NamedTuple):
    """Course of a churn.

    Args:
        said: The answers.
        absent: Number of requests of each model that were refused since it was not loaded.
        failures: Other requests that were not answered, in words.
        ended: Reason why the server counts as ended; None if it answers.
        command: Failure of the command in words; empty if it has none.
    """

    said: Sequence[Said]
    absent: Mapping[str, int]
    failures: Sequence[str] = ()
    ended: str | None = None
    command: str = ""


def ask_in_churn(asker: Asker, asked: ChurnRequest, *, with_base: bool = True) -> Churn:
    """Ask a server's models while its adapters come and go, and attribute each answer; a refusal is inconclusive.

    Args:
        asker: The server.
        asked: The questions.
        with_base: Whether the base model is asked beside the adapters.
    """
    words = None if asked.command is None else asked.command.words
    begun = Churn("inconclusive", "", None, asked.seconds, words, AT_ONCE)
    asker = Asker(asked.questions, asker.speaker, asker.names, asker.find_other)
    try:
        if asker.is_one_model:
            raise EngineError("the server has one model under both names")
        asker.names |= {f"{OTHER} {name}": name for name in _others(asker)}
        probe = Probe(asker)
        cold, noise = {arm: probe.cold(arm) for arm in asker.names}, probe.on_own(BASE)
        names = {arm: name for arm, name in asker.names.items() if with_base or arm != BASE}
        meanwhile = _asked(probe, names, asked)
    except EngineError as error:
        return replace(begun, reason=f"answers in churn were not compared: {error}")
    return judge_churn(begun, asker.models, names, cold, noise, meanwhile)


def _others(asker: Asker) -> list[str]:
    """Names of the other adapters that the server lists and answers for."""
    known = [asker.names[ADAPTER], asker.names[BASE]]
    listed = [name for name, parent in asker.speaker.endpoint.models().items() if parent is not None]
    found = [name for name in listed if not any(is_same_model(name, other) for other in known)]
    return [name for name in found[:MOST_OTHERS] if asker.speaker.has(name)]


def _asked(probe: Probe, names: Mapping[str, str], asked: ChurnRequest) -> Meanwhile:
    """Ask random questions of random models, several at a time, beside the command."""
    endpoint, arms, start, enough = probe.endpoint, [*names], time.monotonic(), Event()
    said, absent, failures, ended = list[Said](), Counter[str](), list[str](), list[str]()

    def ask_on() -> None:
        draw = random.Random()
        while not enough.is_set() and (begun := time.monotonic()) < start + asked.seconds:
            arm, place = draw.choice(arms), draw.choice(probe.places)
            try:
                found = probe.answer(arm, place)
                response = Response(names[arm], place, found.told, any(found.tops))
                said.append(Said(arm, place, probe.along(place, found), time.monotonic() - begun, response))
            except (AbsentError, UnfitRequestError):
                absent[arm] += 1
                time.sleep(ABSENT_PAUSE_S)
            except EngineError as error:
                failures.append(str(error))
                if not _lives(endpoint):
                    ended.append(f"it answers nothing {begun - start:.0f} s after the start: {error}")
                    enough.set()

    with ExitStack() as until:
        failure: Callable[[], str | None] = str
        if asked.command is not None:
            failure = until.enter_context(asked.command.beside())
        threads = [Thread(target=ask_on, daemon=True) for _ in range(AT_ONCE)]
        try:
            for each in threads:
                each.start()
            for each in threads:
                each.join()
        finally:
            enough.set()
        told = failure() or ""
    if not ended and not _lives(endpoint):
        ended.append("it answers nothing any more at the end")
    return Meanwhile(said, absent, failures, ended[0] if ended else None, told)


def _lives(endpoint: Endpoint) -> bool:
    """Whether a server answers anything, or the time for all requests is over, so that nothing shows it."""
    try:
        endpoint.request("/v1/models", timeout_s=LIFE_S)
    except UnansweredError:
        return endpoint.is_over
    except EngineError:
        return True
    return True


def judge_churn(
    begun: Churn,
    models: Models,
    names: Mapping[str, str],
    cold: Mapping[str, Asked],
    noise: Asked,
    meanwhile: Meanwhile,
) -> Churn:
    """Judge answers in churn.

    Args:
        begun: What was asked for.
        models: The questions, and what is known of their answers.
        names: Name on the server of each model that was asked in churn.
        cold: Answers of each model by itself.
        noise: The base model's answers in a cache that nothing else was put into.
        meanwhile: The answers in churn.
    """
    case = _ChurnCase(models, names, cold, noise, meanwhile)
    found = [case.judged(arm) for arm in names]
    shown = replace(begun, noise=case.noise, failed=len(meanwhile.failures), models=[each.shown for each in found])
    told = "; ".join(each.shown.words for each in found)
    if meanwhile.failures:
        told += f"; {len(meanwhile.failures)} requests failed, such as: {meanwhile.failures[0]}"
    if meanwhile.ended is not None:
        reason = f"{SERVER_ENDED}: {meanwhile.ended}; {told}"
        return replace(shown, verdict="differs", reason=reason, fault=SERVER_ENDED)
    worst, cached = max(found, key=lambda each: each.questions), sum(case.is_cached)
    if worst.questions >= FEW_AS_BASE:
        return replace(shown, verdict="differs", reason=f"{worst.fault}: {told}", fault=worst.fault)
    unseen = [f"{each.shown.model}: {', '.join(each.unseen)}" for each in found if each.unseen]
    if worst.questions:
        told = f"wrong answers to fewer than {FEW_AS_BASE} questions may be chance: ask for longer; {told}"
    elif meanwhile.command:
        told = f"{meanwhile.command}; {told}"
    elif cached and cached / len(meanwhile.said) >= share_found(len(meanwhile.said)):
        told = f"{cached} of {len(meanwhile.said)} answers come from a cache of responses, and show nothing; {told}"
    elif unseen:
        told = f"too few answers would show these: {'; '.join(unseen)}; ask for longer; {told}"
    else:
        return replace(shown, verdict="as trained", reason=f"in churn, {told}")
    return replace(shown, reason=f"answers in churn: {told}")


class _Judged(NamedTuple):
    """Answers of one model in churn.

    Args:
        shown: What is told of them.
        questions: Number of questions with wrong answers.
        fault: Name of the fault; None without wrong answers.
        unseen: Wrong answers that would not have been seen, in words.
    """

    shown: ChurnAnswers
    questions: int
    fault: str | None
    unseen: Sequence[str]


class _ChurnCase:
    """Answers in churn beside those of each model by itself."""

    def __init__(
        self,
        models: Models,
        names: Mapping[str, str],
        cold: Mapping[str, Asked],
        noise: Asked,
        meanwhile: Meanwhile,
    ) -> None:
        self._models, self._names, self._meanwhile = models, names, meanwhile
        self._cold = {arm: each.rows for arm, each in cold.items()}
        self.is_cached = from_cache([each.response for each in meanwhile.said])
        alone = self._off(BASE, noise.rows)
        self.noise, self._by_prompt = LogprobDistance.of(alone), by_prompt(alone)
        arms = {arm: [i for i, each in enumerate(meanwhile.said) if each.arm == arm] for arm in names}
        self._said = {arm: [i for i in mine if self._off(arm, meanwhile.said[i].rows)] for arm, mine in arms.items()}
        self._changes = {arm: {o: self._changed(arm, o) for o in self._known(arm)} for arm in names}
        self._busy = self._noise_in_churn()

    def judged(self, arm: str) -> _Judged:
        """Attribute the answers of a model."""
        changes, least = self._changes[arm], self._models.sensitivity * self.noise.rms + FLOOR
        clear = {o: _clear(each, least) for o, each in changes.items()}
        found: list[Owner] = []
        for k, i in enumerate(self._said[arm]):
            prompt = self._models.places[self._meanwhile.said[i].place][0]
            noise = max(self.noise.rms, self._busy, self._by_prompt.get(prompt, 0.0))
            limit = CERTAIN * (self._models.sensitivity * noise + FLOOR)
            near = [o for o, each in changes.items() if clear[o][k] and each[k].along > each[k].size / 2]
            nearest = min(near, key=lambda o: _apart(changes[o][k]), default=OWN)
            if nearest is not OWN and _apart(each := changes[nearest][k]) <= limit + LEFT * _length(each):
                found.append(nearest)
            else:
                found.append(self._unknown(arm) if self._middle(i) > limit else OWN)
        seen = {o: sum(c and f in (OWN, o) for c, f in zip(clear[o], found, strict=True)) for o in changes}
        return self._told(arm, found, {o: share_found(number) for o, number in seen.items() if o.fault is not None})

    def _told(self, arm: str, found: Sequence[Owner], seen: Mapping[Owner, float]) -> _Judged:
        said = [self._meanwhile.said[i] for i in self._said[arm]]
        wrong = [i for i, owner in zip(self._said[arm], found, strict=True) if owner.fault is not None]
        times = sorted(each.seconds for each in said)
        shown = ChurnAnswers(
            self._names[arm],
            len(said),
            dict(Counter(owner.words for owner in found).most_common()),
            len(wrong),
            share_interval(len(wrong), len(said)),
            {owner.words: least for owner, least in seen.items()},
            self._meanwhile.absent.get(arm, 0),
            (median(times), times[math.ceil(0.99 * len(times)) - 1]) if times else None,
        )
        faults = Counter(owner.fault for owner in found if owner.fault is not None)
        fault = max(faults, key=lambda name: (name != NO_KNOWN_WEIGHTS, faults[name]), default=None)
        if sum(self.is_cached[i] for i in wrong) >= FEW_AS_BASE:
            fault = CACHE_OF_RESPONSES
        unseen = [owner.words for owner, least in seen.items() if least >= 1] if said else ["any answer"]
        return _Judged(shown, len({self._meanwhile.said[i].place for i in wrong}), fault, unseen)

    def _known(self, arm: str) -> Iterator[Owner]:
        """Yield the models that an answer of an arm may be of, where they are not as its own."""
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

    @staticmethod
    def _unknown(arm: str) -> Owner:
        """Owner of answers that no known model explains; of another adapter, the command may load other versions."""
        return Owner("of no known weights", None if arm.startswith(OTHER) else NO_KNOWN_WEIGHTS)

    def _noise_in_churn(self) -> float:
        """Distance, in nats, that answers in churn usually have from the nearest known model.

        It is that of the model with the smallest one, since all answers of a model may be wrong, and at most as large
        as arithmetic sets the server's base model apart from PyTorch's.
        """
        found = []
        for arm, mine in self._said.items():
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
                found.append(Off(self._models.places[place][0], fmean(d * d for d in off), max(map(abs, off))))
        return found

    def _middle(self, index: int) -> float:
        """Distance of an answer from its model's own, in nats, that more than half of the positions reach."""
        said = self._meanwhile.said[index]
        return math.sqrt(median_low(each.square for each in self._off(said.arm, said.rows)))

    def _changed(self, arm: str, owner: Owner) -> list[Change]:
        """Project what sets each answer apart from its model's own on what sets another model's apart from that."""
        found = []
        for said in (self._meanwhile.said[i] for i in self._said[arm]):
            y, d = list[float](), list[float]()
            for place, row in sorted(said.rows.items()):
                own, other = self._cold[arm].get(place, {}), owner.rows.get(place, {})
                ids = [i for i in row if i in own and i in other]
                y += [row[i] - own[i] for i in ids]
                d += [other[i] - own[i] for i in ids]
            found.append(projected(self._models.places[said.place][0], y, d))
        return found


def _apart(change: Change) -> float:
    """RMS distance of an answer from another model's, in nats; infinite if they share no token."""
    return math.sqrt(change.rest / change.tokens) if change.tokens else math.inf


def _length(change: Change) -> float:
    """RMS distance of another model's answer from the model's own, in nats."""
    return math.sqrt(change.size / change.tokens)


def _clear(changes: Sequence[Change], least: float) -> list[bool]:
    """Whether noise along the way from one model to another hardly reaches half of it, for each answer.

    Args:
        changes: The answers along the way.
        least: Noise, in nats, that is there at least.
    """
    far = [min(abs(c.along), abs(c.size - c.along)) / math.sqrt(c.size) for c in changes if c.size > 0]
    scale = max(TO_SIGMA * median(far), least) if far else math.inf
    return [math.sqrt(c.size) / 2 > CLEAR * scale for c in changes]
