"""How the client of a vLLM server reads answers, by their bytes and their times of arrival."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import pytest

from loraover.client.at_once import at_once
from loraover.client.endpoint import Endpoint
from loraover.common.errors import EngineError
from loraover.common.hosts import is_near
from loraover_serve.vllm.client import VllmServer

from support.openai_server import Refusal, openai_server

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


@contextmanager
def answering(*pieces: tuple[float, bytes], sent: list[float] | None = None) -> Iterator[str]:
    """The address of a server that answers one request with these bytes, each after a pause in seconds.

    It adds the time before it sends each piece, on `time.perf_counter`'s clock, to `sent`.
    """

    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            for pause, piece in pieces:
                time.sleep(pause)
                if sent is not None:
                    sent.append(time.perf_counter())
                connection.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,), daemon=True)  # which a client that never asks leaves
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join(10)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(text: str, tokens: Sequence[int]) -> bytes:
    """A piece of an answer as vLLM writes it, with characters that are not escaped."""
    choice = {"text": text, "token_ids": tokens, "logprobs": {"token_logprobs": [-0.5] * len(tokens)}}
    piece = json.dumps({"model": "m", "choices": [choice]}, ensure_ascii=False)
    return f"data: {piece}\n\n".encode()


def test_every_answer_is_asked_for_as_the_likeliest_one() -> None:
    """Whatever the folder of the base model makes a server's default."""
    with openai_server(lambda body: "so") as server:
        client = VllmServer(server.url, 0)
        asks: list[Callable[[], object]] = [
            lambda: client.ask("m", "one"),
            lambda: client.complete("m", [1], max_tokens=1),
            lambda: client.stream("m", [1], max_tokens=1, timeout_s=5),
        ]
        for ask in asks:
            with suppress(EngineError):  # the stand-in's answers name no model and no tokens
                ask()
    assert [(body["temperature"], body["repetition_penalty"]) for body in server.bodies] == 3 * [(0, 1)]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_a_line_ends_at_a_line_feed_alone(separator: str) -> None:
    text = f"one{separator}two"
    with answering((0, HEAD + chunk(event(text, [7])) + END)) as url:
        assert VllmServer(url, 0).stream("m", [1], max_tokens=1, timeout_s=5).text == text


def test_a_line_may_come_in_pieces_and_a_piece_hold_lines() -> None:
    first, second, third = (event(text, [i]) for i, text in enumerate(("é", "b", "c")))
    cut = first.index("é".encode()) + 1  # within the character
    pieces = [(0.0, HEAD + chunk(first[:cut])), (0.1, chunk(first[cut:] + second + third) + END)]
    with answering(*pieces) as url:
        done = VllmServer(url, 0).stream("m", [1], max_tokens=3, timeout_s=5)
    assert (done.text, done.token_ids) == ("ébc", (0, 1, 2))
    assert all(at - done.start_s >= 0.1 for at in done.piece_s)


def test_pieces_have_the_times_at_which_they_came() -> None:
    """The answer takes longer than `timeout_s`, which limits silence only."""
    pieces = [(0.0, HEAD), *((0.4, chunk(event("x", [7]))) for _ in range(4)), (0.0, END)]
    times: list[float] = []
    with answering(*pieces, sent=times) as url:
        done = VllmServer(url, 0).stream("m", [1], max_tokens=4, timeout_s=1.2)
    sent = times[1:-1]
    assert all(at <= came for at, came in zip(sent, done.piece_s, strict=True))
    assert done.piece_s[0] < sent[-1]


def test_silence_within_an_answer_ends_it() -> None:
    pieces = [(0.0, HEAD + chunk(event("x", [7]))), (1.0, b"")]
    with answering(*pieces) as url, pytest.raises(EngineError, match="no answer: timed out"):
        VllmServer(url, 0).stream("m", [1], max_tokens=4, timeout_s=0.2)


@pytest.mark.parametrize("end", [b'sk-sesame"}\n\n', b"sk-sesame", b"sk-ses", b'%ssk-sesame"}\n\n' % (470 * b"x")])
def test_a_key_in_a_piece_of_an_answer_is_hidden(end: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server fails in the middle of an answer, or it hangs up, perhaps within the key."""
    monkeypatch.setenv("MY_KEY", "sk-sesame")
    with (
        answering((0, HEAD + chunk(b'data: {"error": "no: ' + end) + END)) as url,
        pytest.raises(EngineError, match=r"m: the (server failed in|answer broke off).*no: .*\*\*") as caught,
    ):
        VllmServer(url, 0, "MY_KEY").stream("m", [1], max_tokens=4, timeout_s=5)
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "near"),
    [("localhost", True), ("127.0.0.9", True), ("::1", True), ("127.example.org", False), ("10.0.0.1", False)],
)
def test_another_machine_is_not_taken_for_this_one(host: str, near: bool) -> None:
    assert is_near(host) is near


def test_requests_at_once_keep_a_servers_limit() -> None:
    """Two answers a second; the others are told when to come again, in one of the two forms that HTTP has."""
    lock, times, refused = threading.Lock(), [0.0, 0.0], count()

    def limited(body: dict[str, Any]) -> str | Refusal:
        with lock:
            if (now := time.monotonic()) - times[-2] >= 1:
                times.append(now)
                return "so"
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
        return Refusal(429, {"Retry-After": date if next(refused) % 4 == 3 else "1"})

    with openai_server(limited) as server:
        client = Endpoint(server.url, timeout_s=30)
        assert at_once(lambda index: client.ask("m", str(index)), range(9)) == 9 * ["so"]
    assert next(refused) > 4


@pytest.mark.parametrize("header", [("x-api-key", "sk-sesame"), ("Authorization", "Bearer sk-sesame")])
def test_a_key_is_sent_in_the_header_that_a_server_reads(
    header: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-sesame")
    with openai_server(lambda body: "so", ("m",), header) as server:
        assert Endpoint(server.url, "MY_KEY").ask("m", "one") == "so"
