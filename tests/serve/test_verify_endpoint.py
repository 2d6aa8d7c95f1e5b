"""Verification of a server that already runs, played by one that answers as models in this process."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraover.client import endpoint
from loraover.common.errors import ConfigError, EngineError
from loraover_serve.engines.base import Setting
from loraover_serve.judge.names import CHANGED, LEAKS
from loraover_serve.verify.report import EngineResult
from loraover_serve.verify.run import verify_engine

from support.openai_server import openai_server
from support.verified import FAULTS, Case, Served, make_case, plant, save_adapter, save_base

KEY_VARIABLE = "THE_SERVERS_KEY"
NAMES = ("base", "shop")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PAUSES_S", ())


@pytest.fixture
def ask(case: Case, tmp_path: Path) -> Callable[..., EngineResult]:
    """Verify a server that answers like this, with changes of the setting."""

    def asked(reply: Any, models: tuple[str, ...] = NAMES, **changes: Any) -> EngineResult:
        with openai_server(reply, models) as server:
            return verify_engine("endpoint", setting(case, server.url, tmp_path, **changes), case.judge)

    return asked


def setting(case: Case, url: str, scratch: Path, **changes: Any) -> Setting:
    return case.setting(scratch, endpoint=url, served_name="shop", **changes)


def right(case: Case, form: str = "ids") -> Served:
    return Served(case.base, {"base": None, "shop": case.adapter}, form)


@pytest.mark.parametrize("form", ["ids", "content", "texts"])
def test_a_server_that_is_right_is_as_trained(form: str, case: Case, ask: Callable[..., EngineResult]) -> None:
    found = ask(right(case, form))
    assert (found.verdict, found.compared) == ("as trained", "top tokens")
    assert found.greedy is not None
    assert found.greedy.equal == 1


@pytest.mark.parametrize("name", ["scaling dropped", "not loaded", "transposed", "permutation dropped", "int8"])
def test_a_planted_fault_is_found_and_named(
    name: str, case: Case, ask: Callable[..., EngineResult], tmp_path: Path
) -> None:
    wrong = plant(FAULTS[name], case.adapter, tmp_path / "wrong")
    found = ask(Served(case.base, {"base": None, "shop": wrong}))
    assert (found.verdict, found.fault) == ("differs", FAULTS[name].fault)
    assert FAULTS[name].words in found.reason


def test_another_base_model_is_named(case: Case, ask: Callable[..., EngineResult], tmp_path: Path) -> None:
    found = ask(Served(save_base(tmp_path / "other", seed=7), {"base": None, "shop": case.adapter}))
    assert (found.verdict, found.fault) == ("differs", "another base model")


class Mixing:
    """A server that answers one model's requests with the other's weights while it has requests for both.

    Args:
        served: the right answers.
        victim: name of the model whose requests are answered wrongly.
    """

    def __init__(self, served: Served, victim: str) -> None:
        self._served, self._victim = served, victim
        self._lock, self._running = threading.Lock(), Counter[str]()

    def __call__(self, body: dict[str, Any]) -> bytes:
        name = body["model"]
        (other,) = set(NAMES) - {name}
        with self._lock:
            self._running[name] += 1
        time.sleep(0.02)  # for requests that were sent together to arrive
        wrong = name == self._victim and self._running[other]
        answer = self._served.answer(body | ({"model": other} if wrong else {})) | {"model": name}
        with self._lock:
            self._running[name] -= 1
        return json.dumps(answer).encode()


@pytest.mark.parametrize(("victim", "fault"), [("base", LEAKS), ("shop", CHANGED)])
def test_answers_that_change_in_a_mixed_batch_are_named(
    victim: str, fault: str, case: Case, ask: Callable[..., EngineResult]
) -> None:
    found = ask(Mixing(right(case), victim))
    assert (found.verdict, found.fault) == ("differs", fault), found.reason
    assert found.mixed is not None
    changed, kept = (found.mixed.base, found.mixed.adapter)[:: 1 if victim == "base" else -1]
    assert kept.rms == 0
    assert changed.rms > 0.5 * (found.effect or 0.0)
    assert found.reason.endswith("answered right: send them so, and judge them alone with without_mixed")


def test_what_is_right_without_mixed_batches_is_judged_alone(case: Case, tmp_path: Path) -> None:
    judge = replace(case.judge, without_mixed=True)
    with openai_server(Mixing(right(case), "base"), NAMES) as server:
        found = verify_engine("endpoint", setting(case, server.url, tmp_path), judge)
    assert (found.verdict, found.mixed) == ("as trained", None)
    assert found.reason.endswith("; mixed batches were not compared: none was asked for, as without_mixed says")


def test_each_request_asks_for_one_token_after_given_tokens(case: Case) -> None:
    with openai_server(right(case), NAMES) as server:
        verify_engine("endpoint", setting(case, server.url, case.base), case.judge)
    questions = case.judge.reference.questions
    scored = [body for body in server.bodies if body["max_tokens"] == 1]
    expected = {q.tokens[: position + 1] for q in questions for position in q.answered}
    for name, probes in (("base", 1), ("shop", 0)):  # the dialect is found once
        found = {tuple(body["prompt"]) for body in scored if body["model"] == name}
        assert expected < found if probes else found == expected
        assert len(found - expected) == probes
    assert not any("prompt_logprobs" in body or body.get("echo") for body in server.bodies)
    assert {(body["temperature"], body["repetition_penalty"]) for body in server.bodies} == {(0, 1)}


def test_an_answer_longer_than_the_window_is_compared(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    long = make_case(base, save_adapter(tmp_path / "adapter", base), new_tokens=40)
    with openai_server(right(long), NAMES) as server:
        found = verify_engine("endpoint", setting(long, server.url, tmp_path), long.judge)
    assert found.verdict == "as trained"
    companions = [body["max_tokens"] for body in server.bodies if len(body["prompt"]) == 1]
    assert set(companions) == {16}, "an answer that is not streamed must be short, or a slow server seems silent"


def test_a_server_that_fails_in_mixed_batches_is_judged_by_the_rest(
    case: Case, ask: Callable[..., EngineResult]
) -> None:
    served = right(case)
    found = ask(lambda body: 500 if len(body["prompt"]) == 1 else served(body))
    assert (found.verdict, found.mixed) == ("as trained", None)
    assert found.mixed_failure is not None
    assert "the server answered 500" in found.mixed_failure
    assert found.reason.endswith(f"; mixed batches were not compared: {found.mixed_failure}")


def test_fields_that_a_server_refuses_are_left_out(case: Case, ask: Callable[..., EngineResult]) -> None:
    served = right(case)
    assert ask(lambda body: 400 if "ignore_eos" in body else served(body)).verdict == "as trained"


def test_the_base_models_name_can_be_found_or_given(case: Case, ask: Callable[..., EngineResult]) -> None:
    served = Served(case.base, {"another name": None, "shop": case.adapter})
    assert ask(served, ("another name", "shop")).verdict == "as trained"
    assert ask(served, (), base_name="another name").verdict == "as trained"
    with pytest.raises(ConfigError, match=r"serves a, b, and not .*base, shop; name the adapter with served_name"):
        ask(served, ("a", "b"))


@pytest.mark.parametrize("key", ["a-secret", "12", "token"])
def test_the_key_is_sent_and_never_shown(
    key: str, case: Case, ask: Callable[..., EngineResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A short key may be a part of the answers' numbers and words, which it must not change."""
    monkeypatch.setenv(KEY_VARIABLE, key)
    served = right(case)
    with openai_server(served, NAMES) as server:
        found = verify_engine(
            "endpoint", setting(case, server.url, tmp_path, endpoint_key_variable=KEY_VARIABLE), case.judge
        )
        assert found.verdict == "as trained"
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {key}"}
    with pytest.raises(EngineError, match=r"answered 401: refused, for Bearer \*\*\*"):
        ask(lambda body: 401, endpoint_key_variable=KEY_VARIABLE)
    with pytest.raises(EngineError, match=r"base was asked, and '\*\*\*' answered"):
        ask(_changed(case, answer={"model": key}), endpoint_key_variable=KEY_VARIABLE)
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(ConfigError, match="no environment variable of the name that was given is set"):
        ask(served, endpoint_key_variable=KEY_VARIABLE)


def _changed(case: Case, **changes: Any) -> Callable[[dict[str, Any]], bytes]:
    served = right(case)

    def reply(body: dict[str, Any]) -> bytes:
        answer = served.answer(body)
        answer["choices"][0] |= changes.get("choice", {})
        return json.dumps(answer | changes.get("answer", {})).encode()

    return reply


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": {"model": "another"}}, "base was asked, and 'another' answered"),
        ({"answer": {"choices": []}}, "the server's answer cannot be read"),
        ({"choice": {"logprobs": None}}, "the server gives no logprobs; start it so that"),
        ({"choice": {"logprobs": {"top_logprobs": [{"unknown word": -1.0}]}}}, "are not those of the base model's"),
        ({"choice": {"logprobs": {"top_logprobs": [{"token_id:5": float("-inf")}]}}}, "answer cannot be read"),
        ({"choice": {"logprobs": {"top_logprobs": [{"token_id:5": -1e80}]}}}, "answer cannot be read"),
        ({"choice": {"logprobs": {"top_logprobs": [{"token_id:500": -1.0}]}}}, "501 tokens or more, and the base"),
        ({"choice": {"logprobs": {"content": [{"id": -5, "logprob": -1.0}]}}}, "a token of a negative id, -5"),
        ({"choice": {"logprobs": {"content": [{"id": 5, "logprob": None}]}}}, "the server's answer cannot be read"),
        ({"choice": {"logprobs": ["text"]}}, "the server's answer cannot be read"),
        ({"choice": {"token_ids": ["a"]}}, "the server's answer cannot be read"),
        ({"choice": {"logprobs": {"top_logprobs": [{f"token_id:{9 * '987'}": -1.0}]}}}, "answer cannot be read"),
        ({"choice": {"logprobs": {"content": [{"id": 10**25, "logprob": -1.0}]}}}, "answer cannot be read"),
        ({"choice": {"token_ids": [72]}}, "generates the token 72, and the base model has 72"),
        ({"choice": {"token_ids": [-1]}}, "generates the token -1, and the base model has 72"),
        ({"answer": {"choices": ["text"]}}, "the server's answer cannot be read"),
    ],
)
def test_answers_that_cannot_be_used_are_errors(
    changes: dict[str, Any], message: str, case: Case, ask: Callable[..., EngineResult]
) -> None:
    with pytest.raises(EngineError, match=message):
        ask(_changed(case, **changes))


@pytest.mark.parametrize("status", [404, 500, 302])
def test_a_refusal_is_an_error(status: int, ask: Callable[..., EngineResult]) -> None:
    with pytest.raises(EngineError, match=f"/completions: the server answered {status}"):
        ask(lambda body: status)


def test_a_server_that_is_not_there_is_an_error(case: Case, tmp_path: Path) -> None:
    with openai_server(lambda body: 500) as gone:
        pass
    with pytest.raises(EngineError, match=f"{gone.url}/v1/models: no answer"):
        verify_engine("endpoint", setting(case, gone.url, tmp_path), case.judge)
    with pytest.raises(ConfigError, match="not the address of a server"):
        verify_engine("endpoint", setting(case, "localhost", tmp_path), case.judge)
