"""Requests to servers that answer, fail, hang, or are asked with a key."""

from __future__ import annotations

import base64
import json
import math
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from loraover.client import endpoint as module
from loraover.client.connection import EXPLANATION_BYTES
from loraover.client.endpoint import Endpoint, UnansweredError
from loraover.client.speaker import Speaker, find_models
from loraover.common.errors import ConfigError, EngineError

from support.openai_server import Answer, Refusal, openai_server

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSES_S", (0.0, 0.0))


def test_it_completes_and_chats() -> None:
    with openai_server(lambda body: "chatted" if "messages" in body else "completed") as server:
        for url in (server.url, f"{server.url}/", f"{server.url}/v1", f"{server.url}/v1/"):
            assert Endpoint(url).ask("m", "one", max_tokens=3, stop=("x",)) == "completed"
            assert Endpoint(url).chat("m", HELLO, max_tokens=4) == "chatted"
        first, second = server.bodies[:2]
    asked = {"model": "m", "temperature": 0}
    assert first == {"path": "/v1/completions", "prompt": "one", "max_tokens": 3, "stop": ["x"], **asked}
    assert second == {"path": "/v1/chat/completions", "messages": HELLO, "max_tokens": 4, **asked}


@contextmanager
def answering(*pieces: bytes, pause_s: float = 0.0, asked: list[bytes] | None = None) -> Iterator[str]:
    """The host and port of a server that gives one request these bytes, and notes what it was asked."""

    def answer_one(server: socket.socket) -> None:
        with suppress(OSError), server.accept()[0] as connection:
            request = connection.recv(65536)
            if asked is not None:
                asked.append(request)
            for piece in pieces:
                time.sleep(pause_s)
                connection.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        thread = threading.Thread(target=answer_one, args=(server,), daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
    thread.join()


def test_a_refusal_that_is_cut_off_is_a_refusal() -> None:
    with (
        answering(b"HTTP/1.1 401 no\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nab") as place,
        pytest.raises(EngineError, match="answered 401"),
    ):
        Endpoint(f"http://{place}").chat("m", HELLO, max_tokens=4)


def test_what_a_server_says_moves_no_cursor() -> None:
    """A terminal would obey it, and JUnit's XML has no character for it."""
    with (
        answering(b"HTTP/1.1 401 no\r\nContent-Length: 9\r\n\r\n\x1b[2J\x00\xff\nno") as place,
        pytest.raises(EngineError, match=r"answered 401: \\x1b\[2J\\x00.\\nno$"),
    ):
        Endpoint(f"http://{place}").chat("m", HELLO, max_tokens=4)
    with openai_server(lambda body: 404, {"\x1b[2J": None, "b": None}) as named:
        endpoint = Endpoint(named.url)
        with pytest.raises(ConfigError, match=r"serves \\x1b\[2J, b, and not"):
            find_models(endpoint, lambda name: pytest.fail(name), adapter="shop", model="base", named=str)
    with openai_server(lambda body: Answer(b"{}", {"X-Pod": "a\x1bb"})) as pods:
        assert Endpoint(pods.url).exchange("/v1/completions", {})[1]["x-pod"] == r"a\x1bb"


def test_half_a_character_of_an_answer_can_be_written() -> None:
    with openai_server(lambda body: "so \ud83d") as server:
        assert Endpoint(server.url).chat("m", HELLO, max_tokens=4) == "so ?"


def test_a_passing_fault_is_passed_over() -> None:
    replies: Iterator[str | int] = iter([503, 429, "at last"])
    with openai_server(lambda body: next(replies)) as server:
        assert Endpoint(server.url).chat("m", HELLO, max_tokens=4) == "at last"


@pytest.mark.parametrize(
    "fault", [500, b"<html>", b"[" * 200_000, b"{}", b'{"choices": []}', b'{"choices": [{"message": null}]}']
)
def test_a_lasting_fault_is_told_after_three_tries(fault: int | bytes) -> None:
    with openai_server(lambda body: fault) as server:
        with pytest.raises(UnansweredError):
            Endpoint(server.url).chat("m", HELLO, max_tokens=4)
        assert len(server.bodies) == 3


def test_a_server_that_hangs_is_given_up() -> None:
    def hang(body: object) -> str:
        time.sleep(5)
        return "too late"

    with openai_server(hang) as server, pytest.raises(UnansweredError, match="timed out"):
        Endpoint(server.url, timeout_s=0.1).chat("m", HELLO, max_tokens=4)


@pytest.mark.parametrize(
    ("seconds", "lasting", "told"),
    [
        (0.6, 60, r"timed out after 0\.6 s"),
        (60, 0.6, "the time limit for all requests was reached after 1 requests; allow"),
    ],
)
def test_a_request_is_given_up_in_time_though_its_answer_trickles(seconds: float, lasting: float, told: str) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n"
    with answering(*(bytes([byte]) for byte in head + 9000 * b" "), pause_s=0.01) as place:
        before = time.monotonic()
        endpoint = Endpoint(f"http://{place}", timeout_s=seconds, ends=before + lasting)
        with pytest.raises(UnansweredError, match=told):
            endpoint.ask("m", "one", max_tokens=3)
        assert time.monotonic() - before < 5


def test_a_pause_that_the_server_asks_for_is_kept_or_told() -> None:
    replies: Iterator[str | Refusal] = iter([*(3 * [Refusal(429, {"Retry-After": "0.3"})]), "at last"])
    with openai_server(lambda body: next(replies)) as server:
        before = time.monotonic()
        assert Endpoint(server.url).chat("m", HELLO, max_tokens=4) == "at last"
        assert time.monotonic() - before >= 0.9
    refusals = iter([Refusal(503, {"Retry-After": each}) for each in ("9000", *3 * (f"1 Jan {9**20} 00:00:00 GMT",))])
    with openai_server(lambda body: next(refusals)) as server:
        for told, sent in ((r" \(it asks for a pause of 9000 s\)", 1), ("", 4)):
            with pytest.raises(UnansweredError, match=rf"answered 503{told}: refused"):
                Endpoint(server.url).chat("m", HELLO, max_tokens=4)
            assert len(server.bodies) == sent


@pytest.mark.parametrize(
    ("owner", "path", "told", "found"),
    [
        ("vllm", "/version", {"version": "0.32.0+cpu"}, ("vllm", "0.32.0+cpu")),
        ("llamacpp", "/props", {"build_info": "b11549-0a1b2c3"}, ("llamacpp", "b11549-0a1b2c3")),
        ("a gateway", "/version", {"version": "0.32.0"}, None),
        ("vllm", "/props", {"build_info": "b11549"}, None),
        ("vllm", "/version", {"version": 32}, None),
        ("vllm", "/version", {"version": "0.32.0\x1b[2J"}, None),
        ("vllm", "/version", {"version": "0" * 100}, None),
        ("vllm", "/version", ["0.32.0"], None),
        (["vllm"], "/version", {"version": "0.32.0"}, None),
    ],
)
def test_a_server_is_known_by_what_it_tells(owner: Any, path: str, told: Any, found: Any) -> None:
    listed = {"data": [{"id": "base", "owned_by": owner}]}
    pages = {"/v1/models": lambda: json.dumps(listed), path: lambda: json.dumps(told)}
    with openai_server(lambda body: 404, pages=pages) as server:
        assert Endpoint(server.url).engine() == found


def test_a_proxy_is_asked_for_the_outside_world_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with openai_server(lambda body: "through the proxy") as proxy, openai_server(lambda body: "straight") as server:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        assert Endpoint(server.url).chat("m", HELLO, max_tokens=4) == "straight"
        assert Endpoint("http://judge.test").chat("m", HELLO, max_tokens=4) == "through the proxy"
        assert [body["path"] for body in proxy.bodies] == ["http://judge.test/v1/chat/completions"]
        for port in ("1", "80"):
            monkeypatch.setenv("NO_PROXY", f"judge.test:{port}")
            monkeypatch.setenv("no_proxy", f"judge.test:{port}")
            refused = nullcontext() if port == "1" else pytest.raises(EngineError, match=r"judge\.test")
            with refused:
                assert Endpoint("http://judge.test").chat("m", HELLO, max_tokens=4) == "through the proxy"
        assert len(proxy.bodies) == 2, "no such host is reached without the proxy"


@pytest.mark.parametrize(
    "address",
    [
        "socks4://alice:sesame@host:1",
        "http://alice:ses/ame@host:1",
        "alice:ses/ame@host:1",
        "http://alice:12/ses/ame@host:1",
        "alice:ses//ame@host:1",
        "http://alice:s[sesame@host:1",
        "http://alice:sesame\u2100@host:1",
    ],
)
def test_a_proxy_that_cannot_be_used_is_told_without_its_user(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, address)
    with pytest.raises(ConfigError, match=r"judge\.test: the environment's proxy cannot be used: expected") as told:
        Endpoint("http://judge.test")
    assert not any(part in str(told.value) for part in ("alice", "ses", "ame@", "12"))
    Endpoint("http://localhost")


def test_more_requests_at_once_than_a_pool_has_places_for() -> None:
    held = threading.Barrier(129)

    def hold(body: object) -> str:
        held.wait(60)
        return "all at once"

    with openai_server(hold) as server, ThreadPoolExecutor(129) as pool:
        endpoint = Endpoint(server.url, timeout_s=120)
        asked = [pool.submit(endpoint.chat, "m", HELLO, max_tokens=4) for _ in range(129)]
        assert {each.result() for each in asked} == {"all at once"}


def test_nobody_there_is_told() -> None:
    with openai_server(lambda body: "x") as server:
        pass
    with pytest.raises(UnansweredError, match="refused"):
        Endpoint(server.url).chat("m", HELLO, max_tokens=4)
    with pytest.raises(UnansweredError, match="refused"):
        Endpoint(server.url).request("/health", timeout_s=math.inf)


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_told_at_once_without_the_key(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-sesame")
    with openai_server(lambda body: status) as server:
        with pytest.raises(EngineError, match=rf"{status}: refused, for Bearer \*\*\*") as caught:
            Endpoint(server.url, "MY_KEY").chat("m", HELLO, max_tokens=4)
        assert server.headers[0]["Authorization"] == "Bearer sk-sesame"
        assert len(server.bodies) == 1
    assert "sesame" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_key_that_an_answer_repeats_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-sesame")
    with openai_server(lambda body: "you sent sk-sesame") as server:
        assert Endpoint(server.url, "MY_KEY").chat("m", HELLO, max_tokens=4) == "you sent ***"


@pytest.mark.parametrize(("status", "form"), [(b"401 no", b"%s"), (b"200 OK", b'{"detail": "%s"}')])
def test_no_part_of_a_key_stays_where_an_answer_is_cut(
    status: bytes, form: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-sesame")
    limit = EXPLANATION_BYTES if status == b"401 no" else module.SHOWN_CHARACTERS
    for short in range(25):
        body = form % ((limit - short) * b"x" + b"sk-sesame" + 99 * b"y")
        reply = b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)
        with answering(reply) as place, pytest.raises(EngineError, match="xxx") as caught:
            Endpoint(f"http://{place}", "MY_KEY", repeats=False).ask("m", "one", max_tokens=3)
        assert "xs" not in str(caught.value)


@pytest.mark.parametrize("status", [b"401 no", b"200 OK"])
def test_a_key_is_hidden_as_json_and_python_write_it(status: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-\"se'same\\")
    body = rb"""{"detail": "sk-\"se'same\\"}"""
    reply = b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)
    with answering(reply) as place, pytest.raises(EngineError, match=r"\*\*\*") as caught:
        Endpoint(f"http://{place}", "MY_KEY", repeats=False).ask("m", "one", max_tokens=3)
    assert "same" not in str(caught.value)


@pytest.mark.parametrize("key", ["123", "text", "choices"])
def test_a_key_that_is_an_ordinary_word_changes_no_answer(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with openai_server(lambda body: f"it is {key}") as server:
        assert Endpoint(server.url, "MY_KEY").ask("m", "one", max_tokens=4) == f"it is {key}"


def test_a_key_is_not_carried_to_another_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-sesame")
    with openai_server(lambda body: 307) as server:
        with pytest.raises(EngineError, match=rf"307 \(a redirect, which is not followed, to {server.url}/elsewhere\)"):
            Endpoint(server.url, "MY_KEY").chat("m", HELLO, max_tokens=4)
        assert [body["path"] for body in server.bodies] == ["/v1/chat/completions"]


def test_further_headers_are_sent_and_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM", "sesame")
    with openai_server(lambda body: 400, key=("X-Team", "another")) as server:
        with pytest.raises(EngineError, match="401"):
            Endpoint(server.url, more=["Authorization=TEAM"]).chat("m", HELLO, max_tokens=4)
        with pytest.raises(EngineError, match=r"401: refused, for \*\*\*"):
            Endpoint(server.url, more=["Authorization=TEAM", "X-Team=TEAM"]).chat("m", HELLO, max_tokens=4)
        assert [each.get("X-Team") for each in server.headers] == [None, "sesame"]


def test_answers_come_with_their_headers_and_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-sesame")
    headers = {"X-Served-By": "pod-7", "Set-Cookie": "session=1", "X-Told": "for sk-sesame", "X-Long": 9000 * "a"}
    with openai_server(lambda body: Answer(b'{"id": 1}', headers)) as server:
        content, told = Endpoint(server.url, "MY_KEY").exchange("/v1/completions", {})
    assert content == {"id": 1}
    assert (told["x-served-by"], told["x-told"], len(told["x-long"])) == ("pod-7", "for ***", 200)
    assert "set-cookie" not in told
    said = b'{"id": "for sk-sesame%s", "choices": [{"logprobs": {"content": [{"id": 1, "logprob": -1}]}}]}'
    with openai_server(lambda body: Answer(said % (9000 * b"a"), {})) as server:
        speaker = Speaker(Endpoint(server.url, "MY_KEY"), "m", lambda dialect: "one", dict)
        assert speaker.answer("m", "one", 1).told["id"] == f"for ***{193 * 'a'}"


def test_all_requests_end_at_the_given_time() -> None:
    with openai_server(lambda body: 503) as server:
        before = time.monotonic()
        with pytest.raises(UnansweredError):
            Endpoint(server.url, ends=before).chat("m", HELLO, max_tokens=4)
        assert time.monotonic() - before < 5
        assert len(server.bodies) <= 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost that signs itself, and its key in the same file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing")
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    alternative = "subjectAltName=DNS:localhost"
    files = ["-addext", alternative, "-keyout", str(path), "-out", str(path.with_name("certificate.pem"))]
    subprocess.run(["openssl", *words.split(), *files], check=True, capture_output=True)
    path.write_text(path.read_text() + path.with_name("certificate.pem").read_text())
    return path


def test_certificates_are_checked(certificate: Path, tmp_path: Path) -> None:
    with openai_server(lambda body: "x", certificate=certificate) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        assert Endpoint(url, ca_file=str(certificate)).chat("m", HELLO, max_tokens=4) == "x"
        with pytest.raises(UnansweredError, match="CERTIFICATE_VERIFY_FAILED"):
            Endpoint(url).chat("m", HELLO, max_tokens=4)
        with pytest.raises(UnansweredError, match="CERTIFICATE_VERIFY_FAILED"):
            Endpoint(server.url, ca_file=str(certificate)).chat("m", HELLO, max_tokens=4)
    (tmp_path / "text").write_text("no certificate")
    for path in ("text", "absent"):
        with pytest.raises(ConfigError, match="cannot be read as certificates"):
            Endpoint(url, ca_file=str(tmp_path / path))


def test_a_tunnel_through_the_proxy_carries_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with answering(b"HTTP/1.1 403 no\r\nContent-Length: 0\r\n\r\n", asked=asked) as place:
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, f"http://user:ses%40me@{place}")
        with pytest.raises(UnansweredError, match="Tunnel connection failed: 403"):
            Endpoint("https://judge.test", repeats=False).chat("m", HELLO, max_tokens=4)
    assert asked[0].startswith(b"CONNECT judge.test:443 HTTP/1.")
    assert b"\r\nProxy-Authorization: Basic " + base64.b64encode(b"user:ses@me") + b"\r\n" in asked[0]


def test_no_key_is_sent_unless_its_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-sesame")
    with openai_server(lambda body: "x") as server:
        Endpoint(server.url).chat("m", HELLO, max_tokens=4)
        assert "Authorization" not in server.headers[0]


def test_faults_of_the_request_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in (
        "localhost:8000",
        "file:///etc/passwd",
        "ftp://host",
        "http://",
        "http://user:word@host",
        "http://:word@host",
        "http://host/v1?key=x",
        "http://user:word@host:port",
        "http://[::1",
    ):
        with pytest.raises(ConfigError, match="not the address of a server") as caught:
            Endpoint(url)
        assert "word" not in str(caught.value)
        assert "key=x" not in str(caught.value)
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match="the given name is not that of an environment variable"):
        Endpoint("http://localhost", "MY_KEY")


@pytest.mark.parametrize("header", ["X:Y=MY_KEY", "=MY_KEY", "Bearer: sk-sesame=MY_KEY", "X\n=MY_KEY", "X", "X="])
def test_a_header_whose_name_none_can_have_is_refused_and_not_shown(
    header: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-sesame")
    with pytest.raises(ConfigError, match="name is not valid for a header; give NAME=VARIABLE") as caught:
        Endpoint("http://localhost", more=[header])
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("seconds", [math.inf, math.nan, 1e10, 0.0, -1.0])
def test_a_time_that_no_request_can_take_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match=r"time-out is .* s, expected more than 0 and at most"):
        Endpoint("http://localhost", timeout_s=seconds)


def test_a_key_of_a_file_with_other_line_ends_is_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-sesame\r\n")
    with openai_server(lambda body: "x") as server:
        Endpoint(server.url, "MY_KEY").chat("m", HELLO, max_tokens=4)
        assert server.headers[0]["Authorization"] == "Bearer sk-sesame"


@pytest.mark.parametrize("key", ["sk-ses\name", "sk-sésame"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(ConfigError, match="a header must not contain") as caught:
        Endpoint("http://localhost", "MY_KEY")
    assert "sk-s" not in str(caught.value)


def test_a_key_in_place_of_its_variable_is_not_shown() -> None:
    with pytest.raises(ConfigError, match="not the key") as caught:
        Endpoint("http://localhost", "sk-sesame")
    assert "sesame" not in str(caught.value)


def test_a_page_takes_no_longer_than_all_requests_may() -> None:
    with answering(b"", pause_s=3) as host:
        start = time.monotonic()
        assert Endpoint(f"http://{host}", ends=start + 0.3).page("/metrics") == ""
        assert time.monotonic() - start < 2
    late = Endpoint("http://localhost:9", ends=time.monotonic() - 1)
    assert late.page("/metrics") == ""
    assert late.sent == 0
