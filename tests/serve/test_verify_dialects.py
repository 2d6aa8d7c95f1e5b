"""Verification of servers that take and answer less than vLLM does, or slowly, each played beside a right adapter."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from loraover.common.errors import ConfigError, EngineError
from loraover_serve import verify_adapter
from loraover_serve.judge.names import CHANGED_BY_OTHER
from loraover_serve.verify.report import EngineResult
from loraover_serve.verify.run import verify_engine

from support.openai_server import Answer, Refusal, Reply, openai_server
from support.verified import FAULTS, Case, Served, make_case, plant, save_adapter, save_base

NAMES = ("base", "shop")
KEY_VARIABLE = "THE_SERVERS_KEY"
Body = dict[str, Any]


def refusing(reply: Reply, is_refused: Callable[[Body], bool], status: int = 400) -> Reply:
    return lambda body: status if is_refused(body) else reply(body)


def top(body: Body) -> int:
    return int(body["top_logprobs"] if "messages" in body else body["logprobs"])


def named(served: Served, change: Callable[[str], str | None]) -> Reply:
    """Answers that name another model than the one that was asked for."""
    return lambda body: json.dumps(served.answer(body) | {"model": change(body["model"])}).encode()


def limited(reply: Reply) -> Reply:
    """Two answers a second; the others are told when to come again, in one of the two forms that HTTP has."""
    lock, times, forms = threading.Lock(), [0.0, 0.0], Counter[str]()

    def answer(body: Body) -> str | int | bytes | Refusal | Answer:
        with lock:
            now = time.monotonic()
            if now - times[-2] < 1:
                forms["refused"] += 1
                date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
                return Refusal(429, {"Retry-After": date if forms["refused"] % 4 == 0 else "1"})
            times.append(now)
        return reply(body)

    return answer


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


def asked(case: Case, scratch: Path, url: str, **changes: Any) -> EngineResult:
    setting = case.setting(scratch, endpoint=url, **({"served_name": "shop"} | changes))
    return verify_engine("endpoint", setting, case.judge)


def right(case: Case, **names: Path | None) -> Served:
    return Served(case.base, {"base": None, "shop": case.adapter} | names)


def test_a_limit_of_two_requests_a_second_is_kept(base: Path, adapter: Path, tmp_path: Path) -> None:
    case = make_case(base, adapter, new_tokens=2, asked=[(5, 6, 7)])
    with openai_server(limited(right(case)), NAMES) as server:
        found = asked(case, tmp_path, server.url, timeout_s=30)
    assert (found.verdict, found.mixed_failure) == ("as trained", None), found.reason


def test_a_key_may_have_a_header_of_its_own(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sk-sesame")
    for key in (("x-api-key", "sk-sesame"), ("Authorization", "Bearer sk-sesame")):
        with openai_server(right(case), NAMES, key) as server:
            assert asked(case, tmp_path, server.url, endpoint_key_variable=KEY_VARIABLE).verdict == "as trained"


def test_chats_are_refused_without_a_template_to_ask_pytorch_with(case: Case) -> None:
    answer = {"choices": [{"logprobs": {"content": [{"id": 5, "logprob": -1.0}]}}]}
    reply = refusing(lambda body: json.dumps(answer).encode(), lambda body: "messages" not in body, 404)
    with pytest.raises(ConfigError, match=r"answers chats only, and the base model's tokenizer has no chat template"):
        verified(case.adapter, case.base, reply)


@pytest.mark.parametrize("part", ["headers", "answer"])
def test_a_server_that_trickles_is_given_up_in_time(part: str, case: Case, tmp_path: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
    sent = head + b" " * 100_000

    def trickle(server: socket.socket) -> None:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=drip, args=(connection,), daemon=True).start()

    def drip(connection: socket.socket) -> None:
        connection.recv(65536)
        start = 0 if part == "headers" else len(head)
        try:
            connection.sendall(sent[:start])
            for byte in sent[start:]:
                connection.sendall(bytes([byte]))
                time.sleep(0.1)
        except OSError:
            pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=trickle, args=(server,), daemon=True).start()
        before = time.monotonic()
        with pytest.raises(EngineError, match="timed out"):
            asked(case, tmp_path, f"http://127.0.0.1:{server.getsockname()[1]}", timeout_s=1)
        assert time.monotonic() - before < 10


def test_an_adapter_may_be_listed_by_another_name_or_not_at_all(case: Case, tmp_path: Path) -> None:
    for listed, name in ((("base", "shop"), "base:shop"), (("base",), "shop"), (("models/base",), "shop")):
        served = Served(case.base, {"base": None, "models/base": None, name: case.adapter})
        with openai_server(served, listed) as server:
            assert asked(case, tmp_path, server.url, served_name=name).verdict == "as trained"
    with (
        openai_server(right(case), ("base",)) as server,
        pytest.raises(ConfigError, match="serves base, and not absent; name the adapter with served_name"),
    ):
        asked(case, tmp_path, server.url, served_name="absent")


class Leaking:
    """A server that answers for the adapter with another one's weights while it has requests for that one."""

    def __init__(self, served: Served) -> None:
        self._served, self._lock, self._running = served, threading.Lock(), Counter[str]()

    def __call__(self, body: Body) -> bytes:
        name = body["model"]
        with self._lock:
            self._running[name] += 1
        time.sleep(0.02)  # for requests that were sent together to arrive
        leaks = name == "shop" and self._running["other"]
        answer = self._served.answer(body | ({"model": "other"} if leaks else {})) | {"model": name}
        with self._lock:
            self._running[name] -= 1
        return json.dumps(answer).encode()


@pytest.mark.parametrize("parent", ["base", None], ids=["told", "untold"])
def test_an_adapter_that_leaks_into_anothers_answers_is_named(parent: str | None, case: Case, tmp_path: Path) -> None:
    other = plant(FAULTS["scaling dropped"], case.adapter, tmp_path / "other")
    models = {"base": None, "shop": parent, "other": parent}
    served = right(case, other=other)
    for reply, verdict in ((served, ("as trained", None)), (Leaking(served), ("differs", CHANGED_BY_OTHER))):
        with openai_server(reply, models) as server:
            found = asked(case, tmp_path, server.url, base_name="base")
        assert (found.verdict, found.fault) == verdict, found.reason
        assert found.mixed is not None
        assert found.mixed.other is not None


def test_another_model_that_refuses_is_left_alone(case: Case, tmp_path: Path) -> None:
    with openai_server(right(case), (*NAMES, "embeddings")) as server:
        found = asked(case, tmp_path, server.url, base_name="base")
    assert (found.verdict, found.mixed_failure) == ("as trained", None)
    assert found.mixed is not None
    assert found.mixed.other is None


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraover.client.endpoint.PAUSES_S", ())
