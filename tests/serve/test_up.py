"""`loraover serve up`, where it listens and the key that it asks for, with a stand-in for vLLM that starts at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loraover.checkpoint import base_model
from loraover.checkpoint.base_model import resolve_base
from loraover.common.command_line import run
from loraover.common.errors import ConfigError, EngineError
from loraover.models.load import ModelSource
from loraover_export.cli import cli as export_cli
from loraover_serve.cli import cli
from loraover_serve.vllm import client as vllm_client
from loraover_serve.vllm import serve as serving
from loraover_serve.vllm.client import VllmServer
from loraover_serve.vllm.serve import read_named, server_config
from loraover_serve.vllm.server import VllmServerConfig, next_free_port, serve_vllm

from support.children import Child
from support.make_checkpoint import make_checkpoint
from support.vllm_stand_in import assert_stopped, stand_in

pytestmark = pytest.mark.process


def up(shop: Path, folder: Path) -> Child:
    """The command in a fork, where SIGHUP is not ignored, as it is below nohup."""
    words = ["up", str(shop), "--vllm", stand_in(folder, "answers"), "--log", str(folder / "log")]
    return Child(lambda: run(cli, words), prepare=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_it_with_its_server(ending: signal.Signals, shop: Path, tmp_path: Path) -> None:
    child = up(shop, tmp_path)
    child.read_until("Ctrl-C stops it")
    os.kill(child.pid, ending)
    ended = child.end()
    assert ended.code == 130, ended.output
    assert_stopped(tmp_path)


def test_a_server_that_dies_is_an_error(shop: Path, tmp_path: Path) -> None:
    child = up(shop, tmp_path)
    child.read_until("Ctrl-C stops it")
    server = int((tmp_path / "pids").read_text().split()[0])
    os.kill(server, signal.SIGKILL)
    ended = child.end()
    assert (ended.code, "vLLM ended or reported a failure" in ended.output) == (2, True), ended.output
    assert_stopped(tmp_path)


def test_a_port_in_use_is_refused(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with taken() as port:
        words = ["up", str(shop), "--port", str(port), "--vllm", stand_in(tmp_path, "answers")]
        assert run(cli, [*words, "--log", str(tmp_path / "log")]) == 2
    assert f"port {port} cannot be used" in capsys.readouterr().err


def test_the_first_error_of_a_log_is_shown_on_a_line_of_its_own(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["up", str(shop), "--vllm", stand_in(tmp_path, "raises"), "--log", str(tmp_path / "log")]
    assert run(cli, words) == 2
    lines = capsys.readouterr().err.splitlines()
    first = next(k for k, line in enumerate(lines) if "ended with code 1" in line)
    assert lines[first + 1] == "ValueError: not enough memory"
    assert lines[-1] == "RuntimeError: see above"


def test_adapters_of_one_name_or_of_two_models_are_refused(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folders with the same name"):
        read_named([shop, shop])
    other = make_checkpoint(tmp_path / "other")
    assert run(export_cli, ["vllm", str(other.path), "-o", str(tmp_path / "second")]) == 0
    both = read_named([shop, tmp_path / "second"])
    with pytest.raises(ConfigError, match=r"\bmodel\b"):
        resolve_base([*both.values()], None, option="model", say=print)
    config = server_config(both, resolve_base([*both.values()], str(other.base), option="model", say=print))
    assert (config.model, list(config.adapters)) == (str(other.base), ["shop", "second"])


def test_the_revision_of_the_adapters_is_served(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(name: str, revision: str | None = None, **more: object) -> ModelSource:
        asked.append((name, revision))
        return ModelSource(name, name, revision and "c0ffee", "")

    monkeypatch.setattr(base_model, "resolve_model", resolve)
    pinned = shutil.copytree(shop, tmp_path / "pinned")
    content = json.loads((pinned / "adapter_config.json").read_text())
    content |= {"base_model_name_or_path": "owner/model", "revision": "v2"}
    (pinned / "adapter_config.json").write_text(json.dumps(content))
    named = read_named([pinned])
    for model in (None, "owner/model"):
        words = server_config(named, resolve_base([*named.values()], model, option="model", say=print)).command(
            "vllm", 1
        )
        assert words[words.index("--revision") + 1] == "c0ffee"
    other = resolve_base([*named.values()], "owner/other", option="model", say=print)
    assert "--revision" not in server_config(named, other).command("vllm", 1)
    assert asked == [("owner/model", "v2")] * 2 + [("owner/other", None)]


def test_a_log_that_cannot_be_written_is_refused(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "missing" / "log"
    assert run(cli, ["up", str(shop), "--vllm", stand_in(tmp_path, "answers"), "--log", str(log)]) == 2
    assert f"{log}: the log cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "alive"), [("busy", True), ("unwell", False)])
def test_a_busy_server_is_alive_and_one_that_reports_a_failure_is_not(
    mode: str, alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "busy":
        monkeypatch.setattr(vllm_client, "HEALTH_TIMEOUT_S", 0.2)
    with serve_vllm(VllmServerConfig("base"), tmp_path / "log", executable=stand_in(tmp_path, mode)) as server:
        assert server.is_alive() is alive


KEY = "a-key-of-the-tests"


@contextmanager
def taken() -> Iterator[int]:
    """A port that something listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
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
            VllmServer(server.url, 0).complete("base", [1], max_tokens=1)


@pytest.mark.parametrize("key", ["two words", "a\nline", "schlüssel"])
def test_a_key_that_no_header_carries_is_refused(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    with (
        pytest.raises(ConfigError, match="VLLM_API_KEY") as caught,
        serve_vllm(VllmServerConfig("base"), tmp_path / "log", executable=stand_in(tmp_path, "answers")),
    ):
        pass
    assert key not in str(caught.value)
