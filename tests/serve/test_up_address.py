"""Where `loraover serve up` listens, and the key that it asks for, with a stand-in for vLLM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loraover.client.tokens import TokenEndpoint
from loraover.common.command_line import run
from loraover.common.errors import ConfigError, EngineError
from loraover_serve.cli import cli
from loraover_serve.vllm import serve as serving
from loraover_serve.vllm.server import VllmServerConfig, next_free_port, serve_vllm

from support.children import Child
from support.vllm_stand_in import stand_in

pytestmark = pytest.mark.process

KEY = "a-key-of-the-tests"


@contextmanager
def taken(host: str = "127.0.0.1") -> Iterator[int]:
    """A port that something listens on."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        listener.listen()
        yield listener.getsockname()[1]


@contextmanager
def started(shop: Path, folder: Path, *words: str, **environment: str) -> Iterator[str]:
    """What `up` prints until it is ready, on both streams."""
    command = ["up", str(shop), "--vllm", stand_in(folder, "answers"), "--log", str(folder / "log"), *words]
    child = Child(lambda: run(cli, command), prepare=lambda: os.environ.update(environment))
    try:
        yield child.read_until("Ctrl-C stops it")
    finally:
        os.kill(child.pid, signal.SIGINT)
        ended = child.end()
    assert ended.code == 130, ended.output


def curl(shown: str, **environment: str) -> str:
    line = next(line for line in shown.splitlines() if line.startswith("curl "))
    words = ["bash", "-c", f"{line} --silent"]
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | environment).stdout


def test_a_key_in_the_environment_is_asked_for_and_sent(shop: Path, tmp_path: Path) -> None:
    with started(shop, tmp_path, VLLM_API_KEY=KEY) as shown:
        assert "ready: " in shown
        assert KEY not in shown
        assert KEY not in (tmp_path / "log").read_text()
        assert "Unauthorized" in curl(shown, VLLM_API_KEY="another")
        assert '"text": "xxxx' in curl(shown, VLLM_API_KEY=KEY)


@pytest.mark.parametrize(
    ("host", "key", "warns"), [("0.0.0.0", "", True), ("0.0.0.0", KEY, False), ("localhost", "", False)]
)
def test_a_host_beyond_loopback_without_a_key_is_warned_of(
    host: str, key: str, warns: bool, shop: Path, tmp_path: Path
) -> None:
    with started(shop, tmp_path, "--host", host, VLLM_API_KEY=key) as shown:
        assert ("anyone who reaches 0.0.0.0 can use this server; set VLLM_API_KEY" in shown) == warns
        assert f'"--host", "{host}"' in (tmp_path / "log").read_text()
        assert "ready: http://127.0.0.1:" in shown or host == "localhost"
        assert '"text": "xxxx' in curl(shown, VLLM_API_KEY=key)


@pytest.mark.parametrize("is_taken", [True, False])
def test_the_next_free_port_is_used_and_named(
    is_taken: bool, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used: list[Any] = []

    @contextmanager
    def serve(config: VllmServerConfig, *_: object, port: int, **__: object) -> Iterator[Any]:
        used.append(port)
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(serving, "serve_vllm", serve)
    with taken() as port:
        first = port if is_taken else next_free_port("127.0.0.1", port + 1)
        monkeypatch.setattr(serving, "FIRST_PORT", first)
        assert run(cli, ["up", str(shop), "--vllm", stand_in(tmp_path, "answers")]) == 130
    shown = capsys.readouterr().err
    if is_taken:
        assert used[0] > first
        assert f"port {first} is taken; using {used[0]}" in shown
    else:
        assert used == [first]
        assert "taken" not in shown


def test_the_usual_port_is_vllms() -> None:
    assert serving.FIRST_PORT == 8000


def test_a_port_taken_on_one_address_is_not_free_on_all() -> None:
    with taken() as port:
        assert next_free_port("0.0.0.0", port) > port


def test_a_port_of_a_vllm_that_loads_its_model_is_not_free() -> None:
    """vLLM binds its port with both options, and listens when the model is loaded."""
    with socket.socket() as loading:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            loading.setsockopt(socket.SOL_SOCKET, option, 1)
        loading.bind(("127.0.0.1", 0))
        port = loading.getsockname()[1]
        assert next_free_port("127.0.0.1", port) > port


def test_a_host_of_another_machine_is_refused(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["up", str(shop), "--vllm", stand_in(tmp_path, "answers"), "--host", "192.0.2.1"]
    assert run(cli, words) == 2
    assert "192.0.2.1 cannot be listened on" in capsys.readouterr().err
    assert not (tmp_path / "pids").exists()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:7"),
        ("0.0.0.0", "http://127.0.0.1:7"),
        ("::", "http://[::1]:7"),
        ("::1", "http://[::1]:7"),
        ("box", "http://box:7"),
    ],
)
def test_where_this_machine_reaches_the_server(host: str, url: str) -> None:
    assert VllmServerConfig("base", host=host).url(7) == url


def test_every_request_brings_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with serve_vllm(VllmServerConfig("base"), tmp_path / "log", executable=stand_in(tmp_path, "answers")) as server:
        assert list(server.models()) == ["base"]
        assert server.stream("base", [1], max_tokens=2, timeout_s=10).token_ids == (7, 7)
        with pytest.raises(EngineError, match="401"):
            TokenEndpoint(server.url).complete("base", [1], max_tokens=1)


@pytest.mark.parametrize("key", ["two words", "a\nline", "schlüssel"])
def test_a_key_that_no_header_carries_is_refused(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    with (
        pytest.raises(ConfigError, match="VLLM_API_KEY") as caught,
        serve_vllm(VllmServerConfig("base"), tmp_path / "log", executable=stand_in(tmp_path, "answers")),
    ):
        pass
    assert key not in str(caught.value)
