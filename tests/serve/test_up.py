"""`loraover-serve up`, with a stand-in for vLLM that takes no minute to start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraover.command import run
from loraover.errors import ConfigError
from loraover_export.cli import cli as export_cli
from loraover_serve.cli import cli
from loraover_serve.up import server_config

from make_checkpoint import make_checkpoint
from vllm_stand_in import assert_stopped, stand_in


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a tiny Llama, written for vLLM."""
    folder = tmp_path_factory.mktemp("up")
    made = make_checkpoint(folder)
    assert run(export_cli, ["vllm", str(made.path), "-o", str(folder / "shop")]) == 0
    return folder / "shop"


@pytest.fixture
def running(adapter: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "loraover_serve.cli", "up", str(adapter), "--vllm", stand_in(tmp_path, "answers")]
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


def test_it_prints_a_request_that_works_and_stops_on_ctrl_c(running: subprocess.Popen[str], tmp_path: Path) -> None:
    shown = read_until(running, "Ctrl-C")
    curl = next(line for line in shown.splitlines() if line.startswith("curl "))
    answer = subprocess.run(["bash", "-c", f"{curl} --silent"], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["choices"][0]["text"] == "x" * 16
    words = json.loads((tmp_path / "log").read_text().removeprefix("words: "))
    assert words[-3:] == ["--max-model-len", "64", "-h"]
    assert words[words.index("--max-lora-rank") + 1] == "8"
    running.send_signal(signal.SIGINT)
    assert running.wait(30) == 130
    assert_stopped(tmp_path)


def test_a_server_that_dies_is_an_error(running: subprocess.Popen[str], tmp_path: Path) -> None:
    read_until(running, "Ctrl-C")
    server = int((tmp_path / "pids").read_text().split()[0])
    os.kill(server, signal.SIGKILL)
    assert running.wait(30) == 2
    assert "ended by itself" in read_until(running, "ended by itself")
    time.sleep(0.1)
    assert_stopped(tmp_path)


def test_a_port_in_use_is_refused(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = ["up", str(adapter), "--port", port, "--vllm", stand_in(tmp_path, "answers")]
        assert run(cli, [*words, "--log", str(tmp_path / "log")]) == 2
    assert f"port {port} cannot be used" in capsys.readouterr().err


def test_the_first_error_of_a_log_is_shown_on_a_line_of_its_own(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["up", str(adapter), "--vllm", stand_in(tmp_path, "raises"), "--log", str(tmp_path / "log")]
    assert run(cli, words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "ended with code 1" in lines[0]
    assert lines[1] == "ValueError: not enough memory"
    assert lines[-1] == "RuntimeError: see above"


def test_adapters_of_one_name_or_of_two_models_are_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folders of one name"):
        server_config([adapter, adapter], None)
    other = make_checkpoint(tmp_path / "other")
    assert run(export_cli, ["vllm", str(other.path), "-o", str(tmp_path / "second")]) == 0
    with pytest.raises(ConfigError, match="--model"):
        server_config([adapter, tmp_path / "second"], None)
    config = server_config([adapter, tmp_path / "second"], str(other.base))
    assert (config.model, list(config.adapters)) == (str(other.base), ["shop", "second"])
