"""The engines that `loraover doctor` shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from loraover_serve.engines import ENGINES, base, engine_class
from loraover_serve.engines import vllm as vllm_engine
from loraover_serve.engines.base import BatchingEngine, TimedEngine
from loraover_serve.engines.installed import InstalledEngine, find_engines

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
def test_an_engine_is_added_by_a_file_and_a_line(adapter: Path) -> None:
    lines = [
        f"export check {adapter} --engine toy",
        f"serve verify {adapter} --engine toy --new-tokens 3",
        f"serve parity --adapter {adapter} --engine toy --num-prompts 10 --new-tokens 3 --margin 1",
        "doctor --offline",
    ]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", ADDED]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, env=environment)
    assert re.search(r"^exit codes 0 0 [013] 0$", done.stdout, re.MULTILINE), done.stderr
    for shown in ("Toy computes it", "toy: as trained", " toy     folded ", "Toy "):
        assert shown in done.stdout
