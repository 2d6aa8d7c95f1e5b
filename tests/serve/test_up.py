"""`loraover serve up`, with a stand-in for vLLM that starts at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraover.checkpoint import base_model
from loraover.common.command_line import run
from loraover.common.errors import ConfigError
from loraover.models.load import ModelSource
from loraover_export.cli import cli as export_cli
from loraover_serve.cli import cli
from loraover_serve.vllm import server as vllm_server
from loraover_serve.vllm.serve import read_named, served_model, server_config
from loraover_serve.vllm.server import VllmServerConfig, serve_vllm

from support.children import Child
from support.make_checkpoint import make_checkpoint
from support.vllm_stand_in import assert_stopped, stand_in

pytestmark = pytest.mark.process


@pytest.fixture
def running(shop: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "loraover_serve.cli", "up", str(shop), "--vllm", stand_in(tmp_path, "answers")]
    command += ["--log", str(tmp_path / "log"), "--", "--max-model-len", "64", "-h"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    yield process
    process.kill()
    process.wait()


def read_until(process: subprocess.Popen[str], end: str) -> str:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if end in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def test_it_prints_a_request_that_works_and_stops_when_it_is_asked(
    running: subprocess.Popen[str], tmp_path: Path
) -> None:
    shown = read_until(running, "Ctrl-C")
    curl = next(line for line in shown.splitlines() if line.startswith("curl "))
    answer = subprocess.run(["bash", "-c", f"{curl} --silent"], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["choices"][0]["text"] == "x" * 16
    words = json.loads((tmp_path / "log").read_text().splitlines()[0].removeprefix("words: "))
    assert words[-3:] == ["--max-model-len", "64", "-h"]
    assert words[words.index("--max-lora-rank") + 1] == "8"
    running.send_signal(signal.SIGINT)
    assert running.wait(120) == 130
    assert_stopped(tmp_path)


def up(shop: Path, folder: Path) -> Child:
    """The command in a fork, where SIGHUP is not ignored, as it is below nohup."""
    words = ["up", str(shop), "--vllm", stand_in(folder, "answers"), "--log", str(folder / "log")]
    return Child(lambda: run(cli, words), prepare=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
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
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = ["up", str(shop), "--port", port, "--vllm", stand_in(tmp_path, "answers")]
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
    with pytest.raises(ConfigError, match="folders of one name"):
        read_named([shop, shop])
    other = make_checkpoint(tmp_path / "other")
    assert run(export_cli, ["vllm", str(other.path), "-o", str(tmp_path / "second")]) == 0
    both = read_named([shop, tmp_path / "second"])
    with pytest.raises(ConfigError, match=r"\bmodel\b"):
        served_model(both, None)
    config = server_config(both, served_model(both, str(other.base)))
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
        words = server_config(named, served_model(named, model)).command("vllm", 1)
        assert words[words.index("--revision") + 1] == "c0ffee"
    assert "--revision" not in server_config(named, served_model(named, "owner/other")).command("vllm", 1)
    assert asked == [("owner/model", "v2")] * 2 + [("owner/other", None)]


@pytest.mark.parametrize(
    "option", ["--port", "--served-model-name=x", "--api_key", "--host", "--lora-modules", "--ssl-certfile=x"]
)
def test_options_that_it_sets_itself_are_refused(
    option: str, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, ["up", str(shop), "--vllm", stand_in(tmp_path, "answers"), "--", option, "1"]) == 2
    assert option.partition("=")[0].replace("_", "-") + " cannot be given" in capsys.readouterr().err
    assert not (tmp_path / "pids").exists()


def test_a_log_that_cannot_be_written_is_refused(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "missing" / "log"
    assert run(cli, ["up", str(shop), "--vllm", stand_in(tmp_path, "answers"), "--log", str(log)]) == 2
    assert f"{log}: the log cannot be written" in capsys.readouterr().err


def test_a_silent_server_is_given_up_and_stopped(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["up", str(shop), "--vllm", stand_in(tmp_path, "silent"), "--log", str(tmp_path / "log")]
    assert run(cli, [*words, "--start-timeout", "4"]) == 2
    assert "did not come up in time; the end of" in capsys.readouterr().err
    assert_stopped(tmp_path)


@pytest.mark.parametrize(("mode", "alive"), [("busy", True), ("unwell", False)])
def test_a_busy_server_is_alive_and_one_that_reports_a_failure_is_not(
    mode: str, alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "busy":
        monkeypatch.setattr(vllm_server, "HEALTH_TIMEOUT_S", 0.2)
    with serve_vllm(VllmServerConfig("base"), tmp_path / "log", executable=stand_in(tmp_path, mode)) as server:
        assert server.is_alive() is alive
