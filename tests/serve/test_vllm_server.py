"""Starting, watching and stopping a server, with a stand-in for vLLM that starts at once."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from loraover.common.errors import EngineError, OutputError
from loraover_serve.vllm import server as vllm_server
from loraover_serve.vllm.client import VllmServer
from loraover_serve.vllm.server import VllmServerConfig, free_port, serve_vllm

from support.http_server import Handler, serving
from support.vllm_stand_in import assert_stopped, stand_in

pytestmark = pytest.mark.process


def config(folder: Path) -> VllmServerConfig:
    return VllmServerConfig("base", adapters={"a": folder / "one two", "b": folder / "b"}, max_lora_rank=8, max_loras=2)


def served(folder: Path, mode: str, **more: Any) -> AbstractContextManager[VllmServer]:
    """A stand-in of this kind, with the adapters a and b."""
    return serve_vllm(config(folder), folder / "log", executable=stand_in(folder, mode), **more)


def test_a_server_answers_and_is_stopped_with_its_children(tmp_path: Path) -> None:
    with served(tmp_path, "answers") as client:
        assert list(client.models()) == ["base"]
        completion = client.complete("a", [1, 2], max_tokens=1)
        assert (completion.text, completion.token_ids, completion.logprobs) == ("x", (7,), (-0.5,))
        assert client.url.startswith("http://127.0.0.1:")
    assert_stopped(tmp_path)
    words = json.loads((tmp_path / "log").read_text().splitlines()[0].removeprefix("words: "))
    assert words[:2] == ["serve", "base"]
    assert words[words.index("--host") + 1] == "127.0.0.1"
    at = words.index("--lora-modules")
    assert words[at + 1 : at + 3] == [f"a={tmp_path / 'one two'}", f"b={tmp_path / 'b'}"]


def test_a_log_has_one_server_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraover_serve.vllm.server.LOCK_S", 0.0)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two, log = stand_in(tmp_path / "one", "answers"), stand_in(tmp_path / "two", "answers"), tmp_path / "log"
    log.write_text("of an earlier server")
    with serve_vllm(config(tmp_path), log, executable=one):
        before = log.read_text()
        with (
            pytest.raises(OutputError, match="another running server writes it; name another with"),
            serve_vllm(config(tmp_path), log, executable=two),
        ):
            pytest.fail("the block ran")
        assert log.read_text().startswith(before)
        with serve_vllm(config(tmp_path), Path(os.devnull), executable=two):
            pass
    assert before.startswith("words: ")


@pytest.mark.parametrize("ending", [KeyboardInterrupt, ValueError])
def test_a_block_that_raises_stops_the_server(ending: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(ending), served(tmp_path, "answers"):
        raise ending
    assert_stopped(tmp_path)


def test_a_stubborn_server_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "STOP_S", 0.5)
    before = time.monotonic()
    with served(tmp_path, "stubborn"):
        pass
    assert time.monotonic() - before < 25
    assert_stopped(tmp_path)


def test_ctrl_c_while_a_stubborn_server_is_asked_to_stop_kills_it(tmp_path: Path) -> None:
    again = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt), served(tmp_path, "stubborn"):
        again.start()
    assert time.monotonic() - before < vllm_server.STOP_S
    assert_stopped(tmp_path)


def test_an_ignored_hangup_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that nohup makes a process ignore."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with served(tmp_path, "answers") as client:
            os.kill(os.getpid(), signal.SIGHUP)
            assert client.version() == "0.0 of a stand-in"
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("ends", ["ended with code 1", "no memory for the cache"]),
        ("fails late", ["'base' does not answer", "500", "head_dim 8"]),
        ("fails on b", ["'b' does not answer"]),
        ("hangs", ["'base' does not answer", "timed out"]),
        ("silent", ["did not come up in time; the end of"]),
    ],
)
def test_a_server_that_is_no_use_says_why(mode: str, words: list[str], tmp_path: Path) -> None:
    server = served(tmp_path, mode, startup_timeout_s=4 if mode in ("hangs", "silent") else 60)
    with pytest.raises(EngineError) as caught, server:
        pytest.fail("the block ran")
    assert all(word in str(caught.value) for word in words)
    if mode != "ends":
        assert_stopped(tmp_path)


class Healthy(Handler):
    def do_GET(self) -> None:
        self.answer(200, b"{}")


def test_another_server_on_the_port_does_not_answer_for_one_that_ended(tmp_path: Path) -> None:
    port = free_port("127.0.0.1")

    @contextmanager
    def replaced(pid: int) -> Iterator[None]:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with serving(Healthy, port=port):
            yield

    server = served(tmp_path, "ends", watch=replaced, port=port)
    with pytest.raises(EngineError, match="ended with code 1"), server:
        pytest.fail("the block ran")


def test_what_is_no_http_at_first_is_waited_for(tmp_path: Path) -> None:
    with served(tmp_path, "stammers") as client:
        assert client.is_healthy()


def test_a_connection_that_breaks_is_an_engine_error(tmp_path: Path) -> None:
    server = served(tmp_path, "hangs up")
    with server as client, pytest.raises(EngineError, match="no answer"):
        client.version()
    with pytest.raises(EngineError, match="no answer"):
        client.models()


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    missing = str(tmp_path / "vllm")
    with (
        pytest.raises(EngineError, match="is vLLM installed"),
        serve_vllm(config(tmp_path), tmp_path / "log", executable=missing),
    ):
        pytest.fail("the block ran")


def test_a_folder_is_served_without_asking_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert VllmServerConfig(str(tmp_path)).variables()["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    named = VllmServerConfig("owner/model").variables()
    assert named["VLLM_NO_USAGE_STATS"] == "1"
    assert named["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert named.get("HF_HUB_OFFLINE") == os.environ.get("HF_HUB_OFFLINE")
