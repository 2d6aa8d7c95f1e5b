"""Verification of a server that already runs, played by models in this process; some take and answer less than vLLM."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from loraover.client import endpoint
from loraover.client.at_once import COMPANION_TOKENS
from loraover.common.errors import ConfigError, EngineError
from loraover_serve import verify_adapter
from loraover_serve.engines.base import Setting
from loraover_serve.judge.names import BASE_OR_TEMPLATE, CHANGED, CHANGED_BY_OTHER, LEAKS
from loraover_serve.judge.names import TEMPLATE as OTHER_TEMPLATE
from loraover_serve.verify.by_pytorch import verify_engine
from loraover_serve.verify.report import EngineResult

from support.openai_server import Reply, openai_server
from support.recorded import record
from support.verified import FAULTS, Case, Served, make_case, plant, save_adapter, save_base

KEY_VARIABLE = "THE_SERVERS_KEY"
NAMES = ("base", "shop")
LONGEST_S = 60.0
"""Time after which a server no longer waits for a request that its client should send."""

Body = dict[str, Any]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PAUSES_S", ())


@pytest.fixture
def ask(case: Case, tmp_path: Path) -> Callable[..., EngineResult]:
    """Verify a server that answers like this, with changes of the setting."""

    def asked(reply: Any, models: Any = NAMES, **changes: Any) -> EngineResult:
        with openai_server(reply, models) as server:
            return verify_engine("endpoint", setting(case, server.url, tmp_path, **changes), case.models)

    return asked


def setting(case: Case, url: str, scratch: Path, **changes: Any) -> Setting:
    return case.setting(scratch, endpoint=url, **({"served_name": "shop"} | changes))


def right(case: Case, form: str = "ids", **names: Path) -> Served:
    return Served(case.base, {"base": None, "shop": case.adapter} | names, form)


@pytest.mark.parametrize("form", ["ids", "content", "texts"])
def test_a_server_that_is_right_is_as_trained(form: str, case: Case, ask: Callable[..., EngineResult]) -> None:
    found = ask(right(case, form))
    assert (found.verdict, found.compared) == ("as trained", "top tokens")
    assert found.greedy is not None
    assert found.greedy.equal == 1


class Mixing:
    """A server that answers one model's requests with another's weights while it has requests for both.

    What is mixed does not depend on how fast the client is: while long answers of the other model are asked for again
    and again, each short one of the victim waits until one of them is in flight.
    """

    def __init__(self, served: Served, victim: str, company: str) -> None:
        self._served, self._victim, self._company = served, victim, company
        self._turn, self._beside, self._begun, self._running = threading.Condition(), "", 0, 0

    def __call__(self, body: Body) -> bytes:
        name, is_long = body["model"], body["max_tokens"] == COMPANION_TOKENS
        with self._turn:
            if is_long:
                self._beside, self._begun, self._running = name, self._begun + 1, self._running + 1
                self._turn.notify_all()
            before, pair = self._begun, (name, self._beside)
            wrong = pair == (self._victim, self._company) and not is_long
            if wrong:
                wrong = bool(self._turn.wait_for(lambda: self._running or self._begun > before, LONGEST_S))
        answer = self._served.answer(body | ({"model": self._company} if wrong else {})) | {"model": name}
        with self._turn:
            self._running -= is_long
        return json.dumps(answer).encode()


@pytest.mark.parametrize(("victim", "company", "fault"), [(*NAMES, LEAKS), (*NAMES[::-1], CHANGED)])
def test_answers_that_change_in_a_mixed_batch_are_named(
    victim: str, company: str, fault: str, case: Case, ask: Callable[..., EngineResult]
) -> None:
    found = ask(Mixing(right(case), victim, company))
    assert (found.verdict, found.fault) == ("differs", fault), found.reason
    assert found.mixed is not None
    changed, kept = (found.mixed.base, found.mixed.adapter)[:: 1 if victim == "base" else -1]
    assert kept.rms == 0
    assert changed.rms > 0.5 * (found.effect or 0.0)
    assert found.reason.endswith("send requests for one model at a time, and judge only these with without_mixed")


def test_what_is_right_without_mixed_batches_is_judged_alone(case: Case, tmp_path: Path) -> None:
    with openai_server(Mixing(right(case), *NAMES), NAMES) as server:
        asked = setting(case, server.url, tmp_path, without_mixed=True)
        found = verify_engine("endpoint", asked, case.models)
    assert (found.verdict, found.mixed) == ("as trained", None)
    assert "requests for both models at the same time: the option without_mixed leaves them out" in found.not_checked


def test_each_request_asks_for_one_token_after_given_tokens(case: Case) -> None:
    with openai_server(right(case), NAMES) as server:
        verify_engine("endpoint", setting(case, server.url, case.base), case.models)
    questions = case.models.questions
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
        found = verify_engine("endpoint", setting(long, server.url, tmp_path), long.models)
    assert found.verdict == "as trained"
    companions = [body["max_tokens"] for body in server.bodies if len(body["prompt"]) == 1]
    assert set(companions) == {16}, "an answer that is not streamed must be short, or a slow server seems silent"


def test_a_server_that_fails_in_mixed_batches_is_judged_by_the_rest(
    case: Case, ask: Callable[..., EngineResult]
) -> None:
    served = right(case)
    found = ask(lambda body: 500 if len(body["prompt"]) == 1 else served(body))
    assert (found.verdict, found.mixed) == ("inconclusive", None), "it was asked for"
    assert found.reason.startswith("100 % of the adapter is applied (")
    assert found.reason.endswith(": judge only the other answers with without_mixed")
    assert found.mixed_failure is not None
    assert "the server answered 500" in found.mixed_failure
    assert f"requests for both models at the same time: {found.mixed_failure}" in found.not_checked


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
        found = verify_engine("endpoint", setting(case, server.url, tmp_path, key_variable=KEY_VARIABLE), case.models)
        assert found.verdict == "as trained"
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {key}"}
    with pytest.raises(EngineError, match=r"answered 401: refused, for Bearer \*\*\*"):
        ask(lambda body: 401, key_variable=KEY_VARIABLE)
    with pytest.raises(EngineError, match=r"base was asked, and '\*\*\*' answered"):
        ask(_changed(case, answer={"model": key}), key_variable=KEY_VARIABLE)
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(ConfigError, match="the given name is not that of an environment variable that is set"):
        ask(served, key_variable=KEY_VARIABLE)


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
        (
            {"choice": {"logprobs": None}},
            "the server returns no logprobs, which the comparison needs; start",
        ),
        ({"choice": {"logprobs": {"top_logprobs": [{"unknown word": -1.0}]}}}, "are not those of the base model's"),
        ({"choice": {"logprobs": {"top_logprobs": [{"token_id:5": float("-inf")}]}}}, "answer cannot be read"),
        ({"choice": {"logprobs": {"top_logprobs": [{"token_id:5": -1e80}]}}}, "answer cannot be read"),
        ({"choice": {"logprobs": {"top_logprobs": [{"token_id:500": -1.0}]}}}, "501 tokens or more, and the base"),
        ({"choice": {"logprobs": {"content": [{"id": -5, "logprob": -1.0}]}}}, "a token of a negative id, -5"),
        ({"choice": {"logprobs": {"content": [{"id": 5, "logprob": None}]}}}, "the server's answer cannot be read"),
        ({"choice": {"token_ids": ["a"]}}, "the server's answer cannot be read"),
        ({"choice": {"logprobs": {"top_logprobs": [{f"token_id:{9 * '987'}": -1.0}]}}}, "answer cannot be read"),
        ({"choice": {"token_ids": [72]}}, "generates the token 72, and the base model has 72"),
        ({"choice": {"token_ids": [-1]}}, "generates the token -1, and the base model has 72"),
    ],
)
def test_answers_that_cannot_be_used_are_errors(
    changes: dict[str, Any], message: str, case: Case, ask: Callable[..., EngineResult]
) -> None:
    with pytest.raises(EngineError, match=message):
        ask(_changed(case, **changes))


# Servers that take and answer less than vLLM does


def refusing(reply: Reply, is_refused: Callable[[Body], bool], status: int = 400) -> Reply:
    return lambda body: status if is_refused(body) else reply(body)


def top(body: Body) -> int:
    return int(body["top_logprobs"] if "messages" in body else body["logprobs"])


def named(served: Served, change: Callable[[str], str | None]) -> Reply:
    """Answers that name another model than the one that was asked for."""
    return lambda body: json.dumps(served.answer(body) | {"model": change(body["model"])}).encode()


DIALECTS: Mapping[str, Callable[[Served], Reply]] = {
    "five logprobs": lambda served: refusing(served, lambda body: top(body) > 5),
    "texts": lambda served: refusing(served, lambda body: not isinstance(body.get("prompt"), str), 422),
    "texts and five logprobs": lambda served: refusing(
        served, lambda body: not isinstance(body.get("prompt"), str) or top(body) > 5
    ),
    "a dated name": lambda served: named(served, lambda name: f"{name}-2026-08-06"),
    "a name with a prefix": lambda served: named(served, lambda name: f"models/{name}"),
    "an empty name": lambda served: named(served, lambda name: ""),
    "no name": lambda served: named(served, lambda name: None),
    "chats": lambda served: refusing(served, lambda body: "messages" not in body, 404),
    "chats and five logprobs": lambda served: refusing(served, lambda body: "messages" not in body or top(body) > 5),
}
FORMS = {"texts": "texts", "texts and five logprobs": "texts", "chats": "content", "chats and five logprobs": "spelled"}


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model with a chat template, and its adapter."""
    folder = tmp_path_factory.mktemp("talking")
    base = save_base(folder / "base", chat=True)
    return base, save_adapter(folder / "adapter", base)


def verified(adapter: Path, base: Path, reply: Reply, **options: Any) -> EngineResult:
    with openai_server(reply, NAMES) as server:
        address: dict[str, Any] = {"endpoint": server.url, "served_name": "shop", "base_name": "base"}
        (found,) = verify_adapter(adapter, model=base, new_tokens=4, **address, **options).engines
    return found


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_right_adapter_is_as_trained_and_a_wrong_one_differs(
    dialect: str, talking: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = talking
    wrong = plant(FAULTS["not loaded"], adapter, tmp_path / "wrong")
    for served, verdict in ((adapter, "as trained"), (wrong, "differs")):
        reply = DIALECTS[dialect](Served(base, {"base": None, "shop": served}, FORMS.get(dialect, "ids")))
        found = verified(adapter, base, reply)
        assert found.verdict == verdict, found.reason
        assert found.greedy is not None
        assert found.mixed is not None


TEMPLATE = "system: be kind. {% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}assistant: "
TELLS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "nothing": lambda ids: {},
    "their number": lambda ids: {"usage": {"prompt_tokens": len(ids)}},
    "all": lambda ids: {"prompt_token_ids": ids},
}


@pytest.mark.parametrize("tells", TELLS)
@pytest.mark.parametrize("by", ["PyTorch", "a reference"])
def test_chats_are_asked_in_the_adapters_template_and_another_one_is_named(
    tells: str, by: str, talking: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its logprobs have little in common with the right ones, as at a temperature of 55."""
    base, adapter = talking
    own = shutil.copytree(adapter, tmp_path / "own")
    (own / "chat_template.jinja").write_text(TEMPLATE)
    served = Served(base, {"base": None, "shop": own}, "content")
    theirs = served.tokenizer.chat_template
    source = {"references": [record(base, own, tmp_path)]} if by == "a reference" else {"adapter": own, "model": base}

    def reply(body: Body) -> int | bytes:
        if "messages" not in body:
            return 404
        return json.dumps(served.answer(body) | TELLS[tells](served.prompt(body))).encode()

    for template, expected in (
        (TEMPLATE, ("as trained", None)),
        (theirs, ("differs", BASE_OR_TEMPLATE if tells == "nothing" else OTHER_TEMPLATE)),
    ):
        served.tokenizer.chat_template = template
        with openai_server(reply, NAMES) as server:
            address: dict[str, Any] = {"endpoint": server.url, "served_name": "shop", "base_name": "base"}
            (found,) = verify_adapter(**source, **address).engines
        assert (found.verdict, found.fault) == expected, found.reason


def test_chats_are_refused_without_a_template_to_ask_pytorch_with(case: Case) -> None:
    answer = {"choices": [{"logprobs": {"content": [{"id": 5, "logprob": -1.0}]}}]}
    reply = refusing(lambda body: json.dumps(answer).encode(), lambda body: "messages" not in body, 404)
    with pytest.raises(ConfigError, match=r"answers chats only, but the base model's tokenizer has no chat template"):
        verified(case.adapter, case.base, reply)


def test_an_adapter_may_be_listed_by_another_name_or_not_at_all(case: Case, ask: Callable[..., EngineResult]) -> None:
    for listed, name in ((("base", "shop"), "base:shop"), (("base",), "shop"), (("models/base",), "shop")):
        served = Served(case.base, {"base": None, "models/base": None, name: case.adapter})
        assert ask(served, listed, served_name=name).verdict == "as trained"
    with pytest.raises(ConfigError, match="serves base, and not absent; name the adapter with served_name"):
        ask(right(case), ("base",), served_name="absent")


@pytest.mark.parametrize("parent", ["base", None], ids=["told", "untold"])
def test_an_adapter_that_leaks_into_anothers_answers_is_named(
    parent: str | None, case: Case, ask: Callable[..., EngineResult], tmp_path: Path
) -> None:
    other = plant(FAULTS["scaling dropped"], case.adapter, tmp_path / "other")
    models, served = {"base": None, "shop": parent, "other": parent}, right(case, other=other)
    leaking = Mixing(served, "shop", "other")
    for reply, verdict in ((served, ("as trained", None)), (leaking, ("differs", CHANGED_BY_OTHER))):
        found = ask(reply, models, base_name="base")
        assert (found.verdict, found.fault) == verdict, found.reason
        assert found.mixed is not None
        assert found.mixed.other is not None


def test_another_model_that_refuses_is_left_alone(case: Case, ask: Callable[..., EngineResult]) -> None:
    found = ask(right(case), (*NAMES, "embeddings"), base_name="base")
    assert (found.verdict, found.mixed_failure) == ("as trained", None)
    assert found.mixed is not None
    assert found.mixed.other is None
