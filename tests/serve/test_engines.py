"""The engines that `loraover doctor` shows, and those in environments of their own: their python, and their errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import psutil
import pytest

from loraover.common.errors import EngineError
from loraover_serve.engines import ENGINES, base, engine_class, runner
from loraover_serve.engines import vllm as vllm_engine
from loraover_serve.engines.base import BatchingEngine, TimedEngine
from loraover_serve.engines.elsewhere import ElsewhereEngine, Runner
from loraover_serve.engines.installed import InstalledEngine, find_engines
from loraover_serve.engines.mlx import MlxEngine
from loraover_serve.engines.openvino import OpenVinoEngine
from loraover_serve.verify.request import VerifyRequest

ADDED = """
import sys
from loraover.cli import cli
from loraover.common.command_line import run
from loraover_export.check.engines import ENGINES as RULES
from loraover_serve.engines import ENGINES, EngineEntry
ENGINES["toy"] = EngineEntry("Toy", "support.toy_engine:ToyEngine", "PEFT's adapters", is_timed=True)
RULES["toy"] = "support.toy_engine:ToyRules"
print("exit codes", *(run(cli, line.split()) for line in sys.stdin))
"""
"""A program that adds an engine by one line in each table, and runs the command lines of its input."""
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def found(name: str) -> InstalledEngine:
    return next(engine for engine in find_engines() if engine.name == name)


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command vllm in an environment elsewhere."""
    command = tmp_path / "bin" / "vllm"
    command.parent.mkdir()
    command.touch(0o755)
    monkeypatch.setenv("LORAOVER_VLLM", str(command))
    return command


def test_the_doctor_finds_the_engines() -> None:
    value = tomllib.loads(PROJECT.read_text())["project"]["entry-points"]["loraover.doctor"]["engines"]
    assert EntryPoint("engines", value, "loraover.doctor").load() is find_engines


@pytest.mark.parametrize("name", ENGINES)
def test_the_table_says_what_parity_can_measure(name: str) -> None:
    kind, entry = engine_class(name), ENGINES[name]
    assert (issubclass(kind, TimedEngine), issubclass(kind, BatchingEngine)) == (entry.is_timed, entry.is_batching)


def test_a_missing_engine_has_a_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (base, vllm_engine):
        monkeypatch.setattr(module, "installed_version", lambda *_: None)
    for name in ("VLLM", "MLX", "OPENVINO"):
        monkeypatch.setenv(f"LORAOVER_{name}", "/nowhere")
    assert [engine.version for engine in find_engines()] == [None] * len(ENGINES)
    assert all(engine.install.startswith(("pip install ", "make ")) for engine in find_engines())


def test_vllm_in_another_environment_has_the_version_recorded_there(vllm: Path) -> None:
    record = vllm.parents[1] / "lib" / "python3.12" / "site-packages" / "vllm-0.99.0+cpu.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.99.0+cpu\n")
    assert found("vLLM").version == "0.99.0+cpu"


def test_a_command_without_a_recorded_version_is_named(vllm: Path) -> None:
    assert found("vLLM").version == f"found at {vllm}"


@pytest.mark.process
def test_an_engine_is_added_by_a_file_and_a_line(adapter: Path, tmp_path: Path) -> None:
    lines = [
        f"export check {adapter} --engine toy",
        f"export prepare {adapter} --engine toy --cache {tmp_path / 'cache'}",
        f"serve verify {adapter} --engine toy --new-tokens 3",
        f"serve parity --adapter {adapter} --engine toy --num-prompts 10 --new-tokens 3 --margin 1",
        "doctor --offline",
    ]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", ADDED]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, env=environment)
    assert re.search(r"^exit codes 0 0 0 [013] 0$", done.stdout, re.MULTILINE), done.stderr
    for shown in ("Toy computes it", "prepared", "toy: as trained", " toy     folded ", "Toy "):
        assert shown in done.stdout


REQUEST = VerifyRequest("adapter")
ARGUMENTS: dict[str, Any] = {"model": "nowhere", "settings": {}, "adapters": {"base": None}}


@pytest.fixture
def running(here: type[MlxEngine], tmp_path: Path) -> Iterator[Runner]:
    with here.run(ARGUMENTS, tmp_path / "log", 60) as runner:
        yield runner


def test_an_engine_in_this_environment_needs_no_variable(here: type[MlxEngine]) -> None:
    assert (here.python(), here.installed(), here.lacking(REQUEST)) == (sys.executable, pytest.__version__, None)


@pytest.mark.parametrize("engine", [MlxEngine, OpenVinoEngine], ids=lambda engine: engine.name)
def test_a_missing_engine_says_how_to_get_it(engine: type[ElsewhereEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(engine.variable, raising=False)
    named = f", and name its python with {engine.variable} ({engine.variable} is not set)"
    assert engine.lacking(REQUEST) == engine.hint + named
    assert engine.hint.startswith("pip install ")
    for python in ("/nowhere/bin/python", "/bin/sh"):
        monkeypatch.setenv(engine.variable, python)
        assert engine.installed() is None
        assert f"found no {engine.distributions[0]} in {python}" in str(engine.lacking(REQUEST))


@pytest.mark.process
def test_an_error_of_the_engine_is_reported_and_the_next_request_answered(running: Runner) -> None:
    for _ in range(2):
        with pytest.raises(EngineError, match="mlx: ModuleNotFoundError: No module named 'mlx'"):
            running.ask("greedy", arm="base", prompt=[1], tokens=1)
    with pytest.raises(EngineError, match=r"mlx: AttributeError: .*'nothing'"):
        running.ask("nothing")


@pytest.mark.process
def test_a_process_that_ended_is_reported(running: Runner) -> None:
    (process,) = (child for child in psutil.Process().children() if runner.__file__ in child.cmdline())
    process.kill()
    process.wait()
    with pytest.raises(EngineError, match="mlx: the process has ended: it printed nothing"):
        running.ask("greedy")


@pytest.mark.process
def test_a_silent_process_is_given_up(here: type[MlxEngine], tmp_path: Path) -> None:
    with (
        here.run(ARGUMENTS, tmp_path / "log", 1e-4) as running,
        pytest.raises(EngineError, match=r"mlx: no answer within 0.0001 s; raise the start timeout"),
    ):
        running.ask("greedy")


def test_a_python_that_is_gone_cannot_be_started(
    here: type[MlxEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python").write_text("no program")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("LORAOVER_HERE", str(tmp_path / "python"))
    with pytest.raises(EngineError, match="cannot be started"), here.run(ARGUMENTS, tmp_path / "log", 1):
        pass
