"""Answers while adapters come and go: each is attributed to the model that it is of, and right servers pass."""

from __future__ import annotations

import json
import math
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, cycle
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any

import pytest

from loraover.client.endpoint import Endpoint
from loraover.client.speaker import Response
from loraover.common.errors import ConfigError
from loraover_serve import verify_adapter
from loraover_serve.judge import churn
from loraover_serve.judge.asker import Asker
from loraover_serve.judge.churn import ChurnRequest, Meanwhile, ask_in_churn, judge_churn
from loraover_serve.judge.estimates import share_interval
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.names import (
    CACHE_OF_RESPONSES,
    CROSSED,
    NO_KNOWN_WEIGHTS,
    STALE_OF_EARLIER,
    STALE_OF_LATER,
)
from loraover_serve.judge.owners import Said
from loraover_serve.judge.results import Churn
from loraover_serve.judge.user_command import UserCommand
from loraover_serve.judge.warm_probe import Asked, WarmProbe

from support.caching_server import BY_NAME, BY_WEIGHTS, CachingServer, Key
from support.http_server import Handler, serving
from support.long_questions import LongCase
from support.openai_server import openai_server
from support.resampled_caches import RightServer
from support.verified import FAULTS, plant

SECONDS, NOISE = 3.0, 0.003  # of a churn; nats
EACH = 4  # answers of the adapter, after which another version is loaded
NAMES = {"base": None, "shop": "base", "other": "base"}
LOOP = """
import itertools, sys, time, urllib.request
for body in itertools.cycle(sys.argv[2:]):
    urllib.request.urlopen(sys.argv[1], body.encode()).read()
    time.sleep(0.3)
"""


@contextmanager
def churning(
    case: LongCase,
    folder: Path,
    key: Key,
    versions: Sequence[Path] = (),
    change: Callable[[dict[str, Any], Any], Any] = lambda body, answer: answer,
    **more: Any,
) -> Iterator[str]:
    """A server with another adapter, which loads versions in turn after each few answers of the adapter."""
    other = plant(FAULTS["permutation dropped"], case.adapter, folder / "other")
    server, lock = CachingServer(case.base, {"base": None, "shop": case.adapter, "other": other}, key, **more), Lock()
    turns, next_versions = count(1), cycle(versions)

    def reply(body: dict[str, Any]) -> Any:
        with lock:
            if "load" in body:
                server.load("shop", Path(body["load"]))
                return b"{}"
            if versions and body["model"] == "shop" and "cache_salt" not in body and next(turns) % EACH == 0:
                server.load("shop", next(next_versions))
            return change(body, server(body))

    with openai_server(reply, NAMES) as running:
        yield running.url


def churned(case: LongCase, url: str) -> Churn:
    """Ask for as long as some thirty answers take, which depends on what else the machine does."""
    asker = Asker.of(case.reference, Endpoint(url), "shop")
    start, probe = time.monotonic(), WarmProbe(Asker(case.caches, asker.speaker, asker.names))
    probe.cold("base", probe.places[:3])
    return ask_in_churn(asker, ChurnRequest(case.caches, max(SECONDS, 15 * (time.monotonic() - start))))


@pytest.mark.parametrize("noise", [0.0, NOISE])
def test_a_server_that_keeps_by_weights_has_no_wrong_answer(noise: float, long_case: LongCase, tmp_path: Path) -> None:
    versions = long_case.earlier, long_case.adapter
    with churning(long_case, tmp_path, BY_WEIGHTS, versions, noise=noise) as url:
        found = churned(long_case, url)
    assert found.fault is None, found.reason
    assert sum(each.wrong for each in found.models) == 0, found.reason
    assert sum(each.answers for each in found.models) > 10
    (shop,) = (each for each in found.models if each.model == "shop")
    assert set(shop.owners) <= {"of the asked model", "of its earlier version"}
    assert found.failed == 0


def test_a_reload_in_place_mixes_versions(long_case: LongCase, tmp_path: Path) -> None:
    with churning(long_case, tmp_path, BY_NAME, (long_case.earlier, long_case.adapter)) as url:
        found = churned(long_case, url)
    assert found.verdict == "differs", found.reason
    assert found.fault in (STALE_OF_EARLIER, STALE_OF_LATER), found.reason
    (shop,) = (each for each in found.models if each.model == "shop")
    assert shop.wrong
    assert shop.share.low > 0
    assert all(each.wrong == 0 for each in found.models if each.model != "shop"), found.reason


def test_versions_that_were_not_recorded_are_of_no_known_weights(long_case: LongCase, tmp_path: Path) -> None:
    stranger = plant(FAULTS["a tenth more"], long_case.adapter, tmp_path / "stranger")
    with churning(long_case, tmp_path, BY_WEIGHTS, [stranger]) as url:
        found = churned(long_case, url)
    assert (found.verdict, found.fault) == ("differs", NO_KNOWN_WEIGHTS), found.reason


def test_an_answer_of_another_model_is_told(long_case: LongCase, tmp_path: Path) -> None:
    turns = count()

    def crossed(body: dict[str, Any], answer: Any) -> Any:
        if body["model"] != "shop" or body.get("cache_salt") or next(turns) % 4:
            return answer
        return json.dumps(of_base.answer({**body, "model": "base"}) | {"model": "shop"}).encode()

    of_base = CachingServer(long_case.base, {"base": None})
    with churning(long_case, tmp_path, BY_WEIGHTS, change=crossed) as url:
        found = churned(long_case, url)
    assert (found.verdict, found.fault) == ("differs", CROSSED), found.reason
    (shop,) = (each for each in found.models if each.model == "shop")
    assert shop.owners["of base"] == shop.wrong > 0
    assert shop.share.low < 0.25 < shop.share.high


def test_a_cache_of_responses_is_named(long_case: LongCase, tmp_path: Path) -> None:
    """A gateway that takes the prompt alone for the question gives the answer of whichever model was asked first."""
    kept: dict[str, Any] = {}

    def cached(body: dict[str, Any], answer: Any) -> Any:
        if body.get("cache_salt"):
            return answer
        first = kept.setdefault(json.dumps(body["prompt"]), json.loads(answer) | {"id": f"cmpl-{len(kept)}"})
        return json.dumps(first | {"model": body["model"]}).encode()

    with churning(long_case, tmp_path, BY_WEIGHTS, change=cached) as url:
        found = churned(long_case, url)
    assert (found.verdict, found.fault) == ("differs", CACHE_OF_RESPONSES), found.reason


def test_verify_and_its_command_line_ask_in_churn(long_case: LongCase, tmp_path: Path) -> None:
    with churning(long_case, tmp_path, BY_NAME) as url:
        asked: dict[str, Any] = {"endpoint": url, "served_name": ["shop"], "quick": True, "churn_s": 1.0}
        (failed,) = verify_adapter(references=[long_case.recorded], run="echo no; exit 3", **asked).engines
        assert "run: the command ended with exit code 3, expected 0; it wrote: no" in failed.reason
        assert failed.verdict == "inconclusive"
        bodies = [json.dumps({"load": str(each)}) for each in (long_case.earlier, long_case.adapter)]
        run = shlex.join([sys.executable, "-c", LOOP, f"{url}/load", *bodies])
        verify_adapter(references=[long_case.recorded], run=run, output=tmp_path / "out", **asked)
        (written,) = json.loads((tmp_path / "out" / "verify.json").read_text())["engines"]
        assert written["churn"]["command"] == run
        assert [each["model"] for each in written["churn"]["models"]] == ["base", "shop", "other"]
        assert "Adapters that came and went: shop" in (tmp_path / "out" / "verify.html").read_text()
    with pytest.raises(ConfigError, match="run needs churn_s"):
        verify_adapter(references=[long_case.recorded], endpoint=url, run="true")


@pytest.mark.statistical
@pytest.mark.parametrize("check", ["caches", "reload", "churn"])
def test_right_servers_raise_no_alarm(check: str, long_case: LongCase) -> None:
    """`python -m benchmarks.cache_alarms` draws 10,000 of each kind."""
    for rms in (2e-5, long_case.caches.rounding("bf16"), 0.032, 0.05):
        for seed in range(60 if (check, rms) == ("churn", 0.032) else 20):
            server = RightServer(long_case.caches, rms, random.Random(seed))
            found = server.churn(60) if check == "churn" else server.caches(with_reload=check == "reload")
            assert found.fault is None, found.reason


def test_noise_of_one_question_is_no_fault(long_case: LongCase) -> None:
    """As the base model shows it there; the adapter's leads more than half of the way to a stale cache."""
    long, server = long_case.caches, RightServer(long_case.caches, 2e-5, random.Random(0))
    (stale,) = (each for each in long.recorded(ADAPTER) if each.fault == STALE_OF_EARLIER)
    cold, noise = {arm: server.asked(arm) for arm in (BASE, ADAPTER)}, dict(server.asked(BASE).rows)
    answers = dict(server.asked(ADAPTER).rows)
    for place in (place for place, (question, _) in enumerate(long.places) if question == 0):
        own, right = cold[ADAPTER].rows[place], long.adapter.rows[place]
        way = {i: stale.rows[place][i] - right[i] for i in own}
        far = 1.3 * math.sqrt(fmean(value * value for value in way.values()))
        noise[place] = {i: v + server.draw.choice((-far, far)) for i, v in cold[BASE].rows[place].items()}
        answers[place] = {i: value + 0.6 * way[i] for i, value in own.items()}
    said = []
    for question in range(len(long.questions)):
        rows = {place: row for place, row in answers.items() if long.places[place][0] == question}
        said.append(Said(ADAPTER, long.first(question), rows, 0.1, Response("shop", question, {}, True)))
    begun, asked = Churn("inconclusive", "", None, SECONDS, None, 1), Asked(BASE, "", noise, None)
    found = judge_churn(begun, long, {ADAPTER: "shop"}, cold, asked, Meanwhile(said, {}))
    assert [each.wrong for each in found.models] == [0], found.reason


def test_failed_requests_are_no_right_answers(long_case: LongCase, tmp_path: Path) -> None:
    turns = count()

    def failing(body: dict[str, Any], answer: Any) -> Any:
        return 403 if "cache_salt" not in body and next(turns) > 20 else answer

    with churning(long_case, tmp_path, BY_WEIGHTS, change=failing) as url:
        found = churned(long_case, url)
    assert found.verdict == "inconclusive", found.reason
    assert found.failed
    assert "requests failed, so too few answers could be judged" in found.reason


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_answers_with_a_status_has_not_ended(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy(Handler):
        def do_GET(self) -> None:
            self.answer(status, b"")

    monkeypatch.setattr(churn, "LIFE_S", 0.5)
    with serving(Busy) as url:
        assert churn._life(Endpoint(url)) == "there"
    assert churn._life(Endpoint(url)) == "ended"


def test_a_command_that_loads_nothing_is_inconclusive(long_case: LongCase, tmp_path: Path) -> None:
    with churning(long_case, tmp_path, BY_WEIGHTS) as url:
        asked: dict[str, Any] = {"endpoint": url, "served_name": ["shop"], "quick": True, "churn_s": 3.0}
        (found,) = verify_adapter(references=[long_case.recorded], run="true", **asked).engines
    assert found.verdict == "inconclusive", found.reason
    assert "no answer showed that the command loaded an adapter" in found.reason
    assert [each for each in found.not_checked if "the command ended after" in each]


def test_a_command_ends_with_what_it_started(tmp_path: Path) -> None:
    with UserCommand(f"sleep 60 & echo $! > {tmp_path}/pid; wait", "--run").beside() as failure:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
            assert failure() is None
        child = int((tmp_path / "pid").read_text())
    stat, end = Path(f"/proc/{child}/stat"), time.monotonic() + 20
    while stat.exists() and ") Z " not in stat.read_text():  # it has ended, though nobody may have waited for it
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(("found", "answers"), [(0, 10), (1, 10), (5, 10), (10, 10), (3, 5000)])
def test_the_interval_of_a_share_is_exact(found: int, answers: int) -> None:
    from scipy import stats

    interval = share_interval(found, answers)
    exact = stats.binomtest(found, answers).proportion_ci(0.99, "exact")
    assert (interval.low, interval.high) == pytest.approx((exact.low, exact.high), abs=1e-9)
