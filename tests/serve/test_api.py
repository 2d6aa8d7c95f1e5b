"""Serving and parity from Python: what the functions return, raise and report; and the commands that call them."""

from __future__ import annotations

import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import click
import pytest

import loraover_serve
from loraover.common.command_line import Command
from loraover.common.errors import ConfigError, EngineError
from loraover.models.device import choose_device
from loraover_serve import measure_parity, serve_adapters
from loraover_serve.cli import cli

from support.lines import Lines
from support.make_checkpoint import Made
from support.vllm_stand_in import assert_stopped, stand_in

pytestmark = pytest.mark.process

SMALL: dict[str, Any] = {"num_prompts": 10, "prompt_tokens": 5, "new_tokens": 4}


@pytest.fixture
def folded(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folded adapter; temporary folders are made in `tmp_path`."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return made.path.parent / "folded"


def command(name: str) -> Command:
    found = cli.get_command(click.Context(cli), name)
    assert isinstance(found, Command)
    return found


def test_every_public_name_is_there() -> None:
    assert all(getattr(loraover_serve, name) is not None for name in loraover_serve.__all__)


def test_adapters_are_served_during_a_block(
    folded: Path, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the command that the environment names."""
    monkeypatch.setenv("LORAOVER_VLLM", stand_in(tmp_path, "answers"))
    report, log, options = Lines(), tmp_path / "log", ["--max-model-len", "64"]
    with serve_adapters([folded], model=made.base, log=log, options=options, report=report) as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert server.names == ("folded",)
        assert server.ask("folded", "The train leaves at", max_tokens=3) == "xxx"
    assert_stopped(tmp_path)
    assert report.lines[-1] == f"starting vLLM with folded; its log is {log}"
    assert re.search('"--max-lora-rank", "8".*"--max-model-len", "64"', log.read_text())
    assert capfd.readouterr() == ("", "")


def test_arguments_of_serving_are_checked_before_the_block() -> None:
    with pytest.raises(ConfigError, match=r"port is 0.*start_timeout_s is 0"):
        serve_adapters(["shop"], port=0, start_timeout_s=0)
    with pytest.raises(ConfigError, match="name folders of adapters in adapters, or one folder of all with folder"):
        serve_adapters()
    with pytest.raises(ConfigError, match=r"folder needs model.*folder='lost': no such folder.*max_lora_rank is 17"):
        serve_adapters(folder="lost", max_lora_rank=17)
    with pytest.raises(ConfigError, match="cache needs folder, which is missing"):
        serve_adapters(["shop"], cache="cache")
    with pytest.raises(ConfigError, match=r"--port cannot .*: name it with port, not in options.*--api-key cannot be"):
        serve_adapters(["shop"], options=["--port=1", "--api_key"])
    with pytest.raises(ConfigError, match=r"start_timeout_s is inf, expected 1e\+06 at most"):
        serve_adapters(["shop"], start_timeout_s=float("inf"))
    with pytest.raises(ConfigError, match="approximate_to_rank is 64, more than max_lora_rank, which is 16; lower one"):
        serve_adapters(folder=".", model="base", max_lora_rank=16, approximate_to_rank=64)


def test_parity_is_measured_without_output(folded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = measure_parity(folded, engines=["torch"], **SMALL)
    assert report.verdict in ("equivalent", "different", "inconclusive")
    assert (report.runs[0].engine, report.runs[0].blocks, report.kept) == ("torch", 5, None)
    assert capfd.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_parity_reports_its_progress_and_writes_its_output(folded: Path, made: Made, tmp_path: Path) -> None:
    report = Lines()
    options: dict[str, Any] = {"model": made.base, "output": tmp_path / "out", "report": report, **SMALL}
    found = measure_parity(str(folded), engines=["torch"], **options)
    assert report.lines[0] == f"loading PyTorch with PEFT to {choose_device()}, fp32"
    assert (found.device, found.compute_dtype) == (str(choose_device()), "fp32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    again = shlex.split(found.command)[3:]
    read = command("parity").make_context("parity", again).params
    assert (read["model"], read["output"]) == (str(made.base), tmp_path / "out")


def test_a_server_that_fails_leaves_its_log(folded: Path, tmp_path: Path) -> None:
    report, vllm = Lines(), stand_in(tmp_path, "dies", after=4 + 4 * 8)
    found = measure_parity(folded, engines=["vllm"], vllm=vllm, memory=0, report=report, **SMALL)
    assert found.verdict == "failed"
    assert found.kept is not None
    assert "words:" in (found.kept / "vllm.log").read_text()
    assert report.lines[-1] == f"kept in {found.kept}: vllm.log"
    assert "kept" not in found.model_dump()


def test_an_error_names_the_log_that_is_kept(folded: Path, tmp_path: Path) -> None:
    report, vllm = Lines(), stand_in(tmp_path, "ends")
    with pytest.raises(EngineError) as caught:
        measure_parity(folded, engines=["vllm"], vllm=vllm, report=report, **SMALL)
    assert caught.value.__notes__ == report.lines[-1:]
    assert report.lines[-1].startswith("kept in ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engines": ["onnx", "tgi"]}, "engines is 'tgi', expected one of vllm, onnx, torch"),
        ({"workload": "file"}, "workload='file' and prompts go together"),
        ({"prompts": "p"}, "go together"),
        ({"workload": "file", "prompts": "p", "prompt_tokens": 5}, "prompt_tokens is for prompts of the built-in"),
        ({"cross_check": True}, "cross_check: for vLLM only; add engines='vllm'"),
        ({"max_concurrency": [4]}, "max_concurrency: for vLLM only"),
        ({"max_concurrency": [4, 1, 4]}, "max_concurrency names one twice: 4, 1, 4"),
        ({"new_tokens": 1, "margin": 2}, r"margin is 2.*, expected 1 at most.*new_tokens is 1, expected 2"),
        ({"seed": -1}, "seed is -1, expected"),
        ({"seed": 10**20}, "seed is 10+, expected"),
        ({"num_prompts": 9}, "num_prompts=10 or more"),
    ],
)
def test_arguments_of_parity_are_checked_first(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure_parity("no such folder", **arguments)
