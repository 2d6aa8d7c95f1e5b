"""Servers behind one address: one of ten that answers otherwise is found, and its header named."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loraover.client.endpoint import Endpoint
from loraover.common.errors import UnscoredError
from loraover_serve.judge.asker import Asker
from loraover_serve.judge.command import CheckOptions, check
from loraover_serve.judge.estimates import requests_that_reach, share_found, share_in_percent
from loraover_serve.judge.evidence import Change, Evidence
from loraover_serve.judge.fleet import some_are_base, tell_apart
from loraover_serve.judge.limits import ADAPTER, CERTAIN, FLOOR, REPEATS
from loraover_serve.judge.models import Answers, AskedOnce, Model
from loraover_serve.judge.names import CACHED, DISAGREE, INTERMITTENT, NOT_APPLIED, SILENT
from loraover_serve.judge.reference import Reference
from loraover_serve.judge.rules import judge

from support.openai_server import Answer, openai_server
from support.recorded_noise import Recorded
from support.reference_server import AS_BASE, RIGHT, Fleet, FromReference

NAMES = {"base": None, "shop": "base"}
BAD = 3


def bf16(reference: Reference) -> float:
    return float(reference.formats["bf16"]["distance"])


def right(reference: Reference) -> FromReference:
    """A server with the noise of bfloat16."""
    return FromReference(reference, lambda name: RIGHT, noise=bf16(reference))


def fleet(reference: Reference, bad: Callable[[dict[str, Any]], int | bytes], size: int = 10) -> Fleet:
    """Servers, of which one is this one."""
    servers: list[Callable[[dict[str, Any]], int | bytes]] = [right(reference) for _ in range(size)]
    servers[BAD] = bad
    return Fleet(servers)


def checked(reply: Any, reference: Reference) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """The result on a server that answers like this, and the adapter's questions in the order of the requests."""
    with openai_server(reply, NAMES) as server:
        found = check(Asker.of(reference, Endpoint(server.url), "shop"), CheckOptions(without_mixed=True))
        bodies = [body for body in server.bodies if body.get("model") == "shop" and body["max_tokens"] == 1]
    return found, [tuple(body["prompt"]) for body in bodies]


def test_one_of_ten_servers_that_lacks_the_adapter_is_named(reference: Reference) -> None:
    found, asked = checked(fleet(reference, FromReference(reference, lambda name: AS_BASE)), reference)
    replicas = found["replicas"]
    assert (found["verdict"], found["fault"]) == ("differs", INTERMITTENT), found["reason"]
    assert replicas.told_apart == {"x-served-by": [f"pod-{BAD}"]}
    assert f"are the base model's (from servers with x-served-by: pod-{BAD}, such as request" in found["reason"]
    assert len(replicas.requests) == replicas.bad
    for told in replicas.requests:
        assert told["x-served-by"] == f"pod-{BAD}"
        assert "via" not in told, "all answers have it"
        assert re.fullmatch("[0-9a-f]+", told["x-request-id"])
    share = replicas.bad / replicas.answers
    assert replicas.requests[0]["x-request-id"] in found["reason"]
    assert found["reason"].endswith(f", about {requests_that_reach(share)} requests would show it again)")
    assert {asked.count(prompt) for prompt in asked} == {REPEATS}
    places = len(reference.places)
    assert len({*asked[:places]}) < 0.9 * places, "the order is random, and not one round after the other"


def test_one_of_ten_servers_with_another_fault_disagrees(reference: Reference) -> None:
    wrong = max(reference.variants[ADAPTER], key=lambda model: model.factor or 0.0)
    found, _ = checked(fleet(reference, FromReference(reference, lambda name: RIGHT, served=wrong)), reference)
    assert (found["verdict"], found["fault"]) == ("differs", DISAGREE), found["reason"]
    assert found["replicas"].told_apart == {"x-served-by": [f"pod-{BAD}"]}, found["reason"]


SILENT_FORMS: Mapping[str, Any] = {"null": None, "none": {"top_logprobs": None}, "empty": {"top_logprobs": [{}]}}


@pytest.mark.parametrize("form", SILENT_FORMS)
def test_one_of_five_servers_that_hides_its_logprobs_is_no_pass(form: str, reference: Reference) -> None:
    def silent(body: dict[str, Any]) -> bytes:
        return json.dumps({"choices": [{"index": 0, "text": "", "logprobs": SILENT_FORMS[form]}]}).encode()

    found, asked = checked(fleet(reference, silent, size=5), reference)
    assert (found["verdict"], found["fault"]) == ("inconclusive", SILENT), found["reason"]
    assert found["replicas"].told_apart == {"x-served-by": [f"pod-{BAD}"]}
    assert found["replicas"].answers >= len(asked), "and the generated ones"


def test_few_answers_without_logprobs_are_counted(reference: Reference) -> None:
    served, left = right(reference), iter([True] * 2)

    def reply(body: dict[str, Any]) -> int | bytes:
        is_silent = body["model"] == "shop" and next(left, False)
        return json.dumps({"choices": [{"index": 0, "text": ""}]}).encode() if is_silent else served(body)

    found, asked = checked(reply, reference)
    answers = len(asked) + len(reference.questions)
    assert found["verdict"] == "as trained", found["reason"]
    assert f"2 of {answers} answers of shop have no logprobs" in found["not_checked"]


def test_a_server_that_hides_the_logprobs_of_the_adapter_alone_is_undecided(reference: Reference) -> None:
    served = right(reference)

    def reply(body: dict[str, Any]) -> int | bytes:
        return served(body) if body["model"] == "base" else json.dumps({"choices": [{"text": ""}]}).encode()

    with pytest.raises(UnscoredError, match="shop: the server returns no logprobs"):
        checked(reply, reference)


class Cache:
    """A cache of responses in front of a server, each of which has an id."""

    def __init__(
        self, reply: Any, key: Sequence[str], headers: Mapping[str, str] = {}, ids: Iterator[str] | None = None
    ) -> None:
        self.reply, self._key, self._headers = reply, key, headers
        self._ids, self.held = ids or map(str, count(1)), dict[str, bytes]()

    def __call__(self, body: dict[str, Any]) -> int | Answer:
        key = json.dumps([body.get(name) for name in self._key])
        if key in self.held:
            return Answer(self.held[key], self._headers)
        content = self.reply(body)
        if isinstance(content, int):
            return content
        self.held[key] = json.dumps(json.loads(content) | {"id": next(self._ids)}).encode()
        return Answer(self.held[key], {"X-Cache": "MISS", "Age": "0", "X-Prefix-Cache": "hit"})


ASKED = ("model", "prompt", "max_tokens")


def test_a_cache_of_old_answers_is_passed_by(reference: Reference) -> None:
    """It holds the answers of a check before the server lost its adapter."""
    cache = Cache(right(reference), (*ASKED, "user"))
    assert checked(cache, reference)[0]["verdict"] == "as trained", "no request is repeated, but for its user"
    cache.reply = FromReference(reference, lambda name: AS_BASE)
    found, _ = checked(cache, reference)
    assert (found["verdict"], found["fault"]) == ("differs", NOT_APPLIED), found["reason"]


HITS: Mapping[str, Mapping[str, str]] = {
    "ids alone": {},
    "age": {"Age": "604800"},
    "x-cache": {"X-Cache": "HIT from squid"},
    "cache-status": {"Cache-Status": "Edge; hit; ttl=5"},
    "hits": {"X-Cache-Hits": "0, 3"},
}


@pytest.mark.parametrize("name", HITS)
def test_a_cache_that_cannot_be_passed_by_is_no_pass(name: str, recorded: Path, reference: Reference) -> None:
    """Of all answers but those to the eight quick questions, ids are seen again; a quick check asks once."""
    cache = Cache(right(reference), ASKED, HITS[name])
    for turn in range(2):
        found, _ = checked(cache, reference)
        assert (found["verdict"], found["fault"]) == ("inconclusive", CACHED), (turn, found["reason"])
    with openai_server(cache, NAMES) as server:
        quick = check(Asker.of(reference, Endpoint(server.url), "shop"), CheckOptions(quick=True))
    assert quick["verdict"] == ("inconclusive" if HITS[name] else "as trained"), quick["reason"]


IDS: Mapping[str, Callable[[], Iterator[str]]] = {
    "one for all": lambda: repeat("cmpl-1"),
    "drawn of few": lambda: (str(random.Random(seed).randrange(999)) for seed in count()),
}


@pytest.mark.parametrize("name", IDS)
def test_servers_that_repeat_ids_of_other_questions_are_no_cache(name: str, reference: Reference) -> None:
    found, _ = checked(Cache(right(reference), (*ASKED, "user"), ids=IDS[name]()), reference)
    assert (found["verdict"], found["fault"]) == ("as trained", None), found["reason"]


def test_ten_right_servers_with_noise_are_one(reference: Reference) -> None:
    found, _ = checked(fleet(reference, right(reference)), reference)
    assert (found["verdict"], found["fault"], found["replicas"]) == ("as trained", None, None), found["reason"]
    share = share_in_percent(found["visible_share"])
    unseen = f"a server without the adapter that gives less than {share} of the answers (--repeats asks more often)"
    pods = [f"pod-{index}" for index in range(10)]
    others = f"servers other than those that answered (x-served-by: {', '.join(pods)})"
    assert [each for each in found["not_checked"] if "server" in each] == [unseen, others]
    assert found["servers"] == {"x-served-by": pods}


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"X-Backend-Server": "10.0.0.7"}, "servers other than those that answered (x-backend-server: 10.0.0.7)"),
        (
            {"Server": "uvicorn", "X-Envoy-Upstream-Service-Time": "7"},
            "how many servers have answered: no header of the answers names them",
        ),
    ],
)
def test_a_balancer_that_sends_one_client_to_one_server_is_told(
    headers: Mapping[str, str], words: str, reference: Reference
) -> None:
    """One of two servers lacks the adapter, and is never reached."""
    served = right(reference)

    def reply(body: dict[str, Any]) -> int | Answer:
        content = served(body)
        return content if isinstance(content, int) else Answer(content, headers)

    found, _ = checked(reply, reference)
    assert found["verdict"] == "as trained"
    assert words in found["not_checked"]


def drawn(reference: Reference, draw: random.Random, noise: float) -> Answers:
    """Answers of servers with noise."""

    def rows(model: Model) -> dict[int, dict[int, float]]:
        return {p: {i: v + draw.gauss(0, noise) for i, v in row.items()} for p, row in enumerate(model.rows)}

    told: dict[int, dict[str, str]] = {place: {} for place in range(len(reference.places))}
    rounds = [AskedOnce(rows(reference.adapter), told) for _ in range(REPEATS)]
    return Answers(rows(reference.base), rounds[0].rows, rounds=rounds)


def moved(prompt: int, share: float) -> Change:
    """An answer that goes this share of the way from the base model's to the adapter's."""
    size = 9.0
    return Change(prompt, 20, share * size, size, share**2 * size, (1 - share) ** 2 * size)


@pytest.mark.parametrize(("share", "is_fleet"), [(0.15, False), (0.4, False), (0.6, True), (1.0, True)])
def test_noisy_answers_of_the_base_are_no_answers_of_the_adapter(share: float, is_fleet: bool) -> None:
    """A server of the base alone: at some positions vLLM in bfloat16 is several times the noise off."""
    answers = [moved(prompt, 0.01) for prompt in range(57)], [moved(prompt, share) for prompt in range(7)]
    case: Any = SimpleNamespace(as_base=answers, repeats=())
    assert (some_are_base(case) is not None) == is_fleet


ODD = [([(0, 0), (1, 0)], None), ([(0, 0), (0, 1), (0, 2)], None), ([(0, 0), (1, 0), (2, 0)], DISAGREE)]


@pytest.mark.parametrize(("places", "fault"), ODD)
def test_two_answers_or_one_odd_question_are_chance(
    places: list[tuple[int, int]], fault: str | None, reference: Reference
) -> None:
    answers = drawn(reference, random.Random(5), bf16(reference))
    rows = dict(answers.rounds[1].rows)
    for at in map(reference.places.index, places):
        rows[at] = {i: value - 9.0 for i, value in rows[at].items()}
    rounds = [answers.rounds[0], answers.rounds[1]._replace(rows=rows), *answers.rounds[2:]]
    found = judge(Evidence(reference, replace(answers, rounds=rounds)))
    assert found["fault"] == fault, found["reason"]


@pytest.mark.statistical
@pytest.mark.parametrize("louder", [0.0, 1.0, 2.0, 20.0])
def test_noise_never_disagrees(louder: float, reference: Reference) -> None:
    draw = random.Random(5)
    for _ in range(20):
        found = judge(Evidence(reference, drawn(reference, draw, louder * bf16(reference))))
        assert found["replicas"] is None, found["reason"]


@pytest.mark.parametrize("engine", Recorded.all(), ids=lambda engine: engine.name)
def test_no_recorded_engine_disagrees_with_itself(engine: Recorded) -> None:
    """Its base model was asked twice; the limit is that of bfloat16, whatever the engine's format."""
    (plain,) = (one for one in Recorded.all() if one.number_format == "bf16")
    limit = CERTAIN * math.sqrt(2) * (plain.sensitivity * plain.noise("base") + FLOOR)
    assert engine.largest_between("base", "again") < limit / 3


TOLD: Mapping[str, tuple[list[dict[str, str]], list[dict[str, str]], dict[str, list[str]]]] = {
    "a pod": ([{"pod": "7"}] * 4, [{"pod": "1"}, {"pod": "2"}] * 9, {"pod": ["7"]}),
    "two pods": ([{"pod": "7"}, {"pod": "8"}] * 4, [{"pod": "1"}] * 9, {"pod": ["7", "8"]}),
    "a header that is absent": ([{}] * 4, [{"release": "2"}] * 9, {"release": [""]}),
    "a pod that is mostly wrong": ([{"pod": "7"}] * 4, [{"pod": "7"}] * 3 + [{"pod": "1"}] * 9, {"pod": ["7"]}),
    "a pod that is mostly right": ([{"pod": "7"}] * 4, [{"pod": "7"}] * 4 + [{"pod": "1"}] * 9, {}),
    "one server for all": ([{"server": "uvicorn"}] * 4, [{"server": "uvicorn"}] * 9, {}),
    "one server for few": ([{"server": "uvicorn"}] * 4, [{"server": "uvicorn"}] * 3, {}),
    "ids of requests": ([{"id": "1"}, {"id": "2"}, {"id": "3"}], [{"id": "4"}] * 9, {}),
    "lengths": ([{"content-length": "7"}] * 4, [{"content-length": "9"}] * 9, {}),
    "no headers": ([{}] * 4, [{}] * 9, {}),
}


@pytest.mark.parametrize("name", TOLD)
def test_headers_that_tell_servers_apart(name: str) -> None:
    bad, good, expected = TOLD[name]
    assert tell_apart(bad, good) == expected


@pytest.mark.parametrize("share", [0.5, 0.1, 0.05, 0.01])
def test_so_many_requests_reach_a_share_and_show_it(share: float) -> None:
    """The page on checks has these figures."""
    requests = requests_that_reach(share)
    assert requests == math.ceil(math.log(0.01) / math.log(1 - share))
    assert (1 - share) ** requests <= 0.01 < (1 - share) ** (requests - 1)
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "check-a-server.md").read_text()
    answers = next(number for number in count(1) if share_found(number) <= share)
    assert f"\n| {100 * share:g} % | {requests} | {answers} |\n" in page
