"""Servers behind one address, some of which answer wrongly: replicas that have lost the adapter, or serve another.

The answers of servers with the same weights to one question differ by rounding alone. Two answers may be CERTAIN times
as far apart as rounding to bfloat16 makes them, or CERTAIN times the median difference of such answers. Of the recorded
engines (`python -m benchmarks.verify_noise` in tests/) all but vLLM repeat their answers exactly, and vLLM in bfloat16
stays below a third of this limit at every position.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import compress
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from loraover_serve.judge.case import Case
from loraover_serve.judge.estimates import requests_that_reach, share_found, share_in_percent
from loraover_serve.judge.evidence import Change
from loraover_serve.judge.limits import CERTAIN, FEW_AS_BASE, FLOOR
from loraover_serve.judge.names import CACHED, DISAGREE, INTERMITTENT, SILENT
from loraover_serve.judge.results import Replicas

if TYPE_CHECKING:
    from loraover.client.speaker import Response

SHOWN = 16  # servers that are named
REQUEST_IDS = ("x-request-id", "request-id", "id")
OF_SERVERS = {"served", "server", "backend", "upstream", "pod", "node", "host", "replica", "instance", "worker"}
OF_TIMES = {"time", "latency", "duration", "ms", "status", "version", "count"}
OF_CONTENT = {"content-length"}  # headers that follow from the answer


class Split(NamedTuple):
    """Answers of a model, of which some are wrong.

    Args:
        words: Description of the wrong answers.
        bad: Headers and id of each wrong response.
        good: Headers and ids of the other responses at which the fault would be seen.
        model: The model, in words.
    """

    fault: str
    words: str
    bad: Sequence[Mapping[str, str]]
    good: Sequence[Mapping[str, str]]
    model: str = "the adapter"

    @property
    def share(self) -> float:
        """Share of the wrong answers."""
        return len(self.bad) / (len(self.bad) + len(self.good))

    @property
    def told_apart(self) -> dict[str, list[str]]:
        """Headers by which the servers of the wrong answers are known."""
        return tell_apart(self.bad, self.good)

    @property
    def counted(self) -> str:
        """How many answers are wrong, in words."""
        answers = len(self.bad) + len(self.good)
        return f"{len(self.bad)} of {answers} answers of {self.model} {self.words}"

    @property
    def is_found(self) -> bool:
        """Whether the number of answers would show a server with this share of wrong ones."""
        return self.share >= share_found(len(self.bad) + len(self.good))

    @property
    def reason(self) -> str:
        """Number of wrong answers and the servers that give them, in words; `shown` has all requests."""
        where = [
            f"from servers with {name}: {' or '.join(value or '(absent)' for value in values[:SHOWN])}"
            for name, values in self.told_apart.items()
            if name not in REQUEST_IDS
        ]
        ids = (next((each[name] for name in REQUEST_IDS if name in each), None) for each in self.bad)
        where += [f"such as request {each}" for each in ids if each][:1]
        times = requests_that_reach(self.share)
        where += [f"about {times} requests would show it again"] if times > 1 else []
        return self.counted + (f" ({', '.join(where)})" if where else "")

    def shown(self) -> Replicas:
        """The wrong answers, as verify.json has them."""
        told = [*self.bad, *self.good]
        varying = {name for each in told for name in each if len({one.get(name) for one in told}) > 1}
        requests = [{name: value for name, value in each.items() if name in varying} for each in self.bad]
        answers = len(self.bad) + len(self.good)
        return Replicas(answers, len(self.bad), self.told_apart, requests)


def some_are_base(case: Case) -> Split | None:
    """Some of the adapter's answers are the base model's, and others are nearer to the right ones.

    The base model's own answers have noise as well, but it does not point towards the adapter's answers.
    """
    as_base, others = case.as_base
    if is_chance(case, as_base) or sum(each.rest < each.total for each in others) < FEW_AS_BASE:
        return None
    return Split(INTERMITTENT, "are the base model's", sources(as_base), sources(others))


def sources(answers: Sequence[Change]) -> list[Mapping[str, str]]:
    """Return the headers of the responses with these answers."""
    return [each.source for each in answers]


def is_chance(case: Case, bad: Sequence[Change]) -> bool:
    """Whether wrong answers are so few that chance alone may make them.

    Answers to one question are not independent: if it is asked several times, questions are counted instead.
    """
    return len({each.prompt for each in bad} if case.repeats else bad) < FEW_AS_BASE


def some_disagree(case: Case) -> Split | None:
    """Split answers to one question that rounding cannot set so far apart; those near the right ones are good.

    Only answers are counted in which a missing adapter would be seen, because it changes them enough.
    """
    apart = [each.apart for each in case.repeats if each.apart is not None]
    if not apart:
        return None
    limit = disagreement_limit(case, median(apart))
    bad = [each.change for each in case.repeats if (each.apart or 0.0) > limit]
    if is_chance(case, bad):
        return None
    agreeing = [each.change for each in case.repeats if (each.apart or 0.0) <= limit]
    good = [each for each in agreeing if each.size > (2 * limit) ** 2 * each.tokens] or agreeing
    return Split(DISAGREE, "differ from other answers to the same question", sources(bad), sources(good))


def some_say_nothing(responses: Sequence[Response]) -> Iterator[Split]:
    """Yield responses that cannot be judged, for each model that has any."""
    kinds = {
        SILENT: ("have no logprobs", [not each.is_scored for each in responses]),
        CACHED: ("come from a cache of responses", from_cache(responses)),
    }
    for fault, (words, those) in kinds.items():
        for model in dict.fromkeys(each.model for each in compress(responses, those)):
            mine = [(each.told, is_one) for each, is_one in zip(responses, those, strict=True) if each.model == model]
            bad, others = ([told for told, is_one in mine if is_one == kind] for kind in (True, False))
            yield Split(fault, words, bad, others, model)


def from_cache(responses: Sequence[Response]) -> list[bool]:
    """Whether each response comes from a cache: its headers say so, or an earlier one to its question has the same id.

    Some servers give one id to every response, or reuse a few: an id that two questions share shows nothing.
    """
    questions = defaultdict[str, set[Hashable]](set)
    for each in responses:
        questions[each.told.get("id", "")].add(each.question)
    seen, found = {""}, list[bool]()
    for each in responses:
        index = each.told.get("id", "")
        is_repeated = index in seen and len(questions[index]) == 1
        found.append(is_repeated or any(is_hit(*header) for header in each.told.items()))
        seen.add(index)
    return found


def is_hit(name: str, value: str) -> bool:
    """Whether a header says that its response comes from a cache of responses, not from one of keys and values."""
    if name == "age":  # seconds since the response was made
        return value.isdecimal() and int(value) > 0
    if "cache" not in name or any(word in name for word in ("control", "kv", "prefix", "prompt")):
        return False
    if name.endswith(("hit", "hits")):
        return bool(re.search("[1-9]|true|yes", value.lower()))
    return bool(re.search(r"\bhit\b|^stale$", value.lower()))


def unseen_servers(case: Case) -> Iterator[str]:
    """Yield the servers behind the address that the answers would not show, in words; none if asked only once.

    A balancer may send one client to one server, however often it asks.
    """
    if not case.repeats:
        return
    shown = share_found(sum(map(len, case.as_base)))
    share = f" that gives less than {share_in_percent(shown)} of the answers" if shown < 1 else " beside right ones"
    yield f"a server without the adapter{share} ({case.option('repeats')} asks more often)"
    told = [each.told for each in case.evidence.answers.responses]
    for name, values in servers_seen(told).items():
        more = ", ..." if len(values) > SHOWN else ""
        yield f"servers other than those that answered ({name}: {', '.join(values[:SHOWN])}{more})"
        return
    yield "how many servers have answered: no header of the answers names them"


def servers_seen(told: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """The header that names the server of each response, with its values; if several do, the one with most values."""
    found = {}
    for name in {name for each in told for name in each if is_server(name)}:
        values = sorted({each[name] for each in told if name in each})
        if 2 * len(values) <= len(told):  # else each request has another
            found[name] = values
    most = max(sorted(found), key=lambda name: len(found[name]), default=None)
    return {} if most is None else {most: found[most]}


def is_server(name: str) -> bool:
    """Whether a header of this name says which server has answered; the header `Server` only names software."""
    words = set(re.split("[-_]", name))
    return name != "server" and bool(words & OF_SERVERS) and not words & OF_TIMES


def disagreement_limit(case: Case, usual: float) -> float:
    """Largest RMS difference, in nats, of two answers to one question by servers with the same weights."""
    arithmetic = case.evidence.models.sensitivity * case.evidence.models.rounding("bf16") + FLOOR
    return CERTAIN * max(math.sqrt(2) * arithmetic, usual)


def tell_apart(bad: Sequence[Mapping[str, str]], good: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Headers by which the servers of wrong answers are known, with their values; empty for an absent header.

    At least two wrong answers have a value on average, so that names of single requests do not count, and most answers
    with these values are wrong.

    Args:
        bad: Headers of each wrong answer.
        good: Headers of each right answer.
    """
    found = {}
    for name in sorted({name for each in (*bad, *good) for name in each} - OF_CONTENT):
        values = {each.get(name, "") for each in bad}
        others = sum(each.get(name, "") in values for each in good)
        if 2 * len(values) <= len(bad) and others < min(len(bad), len(good)):
            found[name] = sorted(values)
    return found
