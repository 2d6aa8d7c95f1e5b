"""The engines that `loraover doctor` shows."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint, version
from pathlib import Path

import pytest

from loraover_serve.engines import installed
from loraover_serve.engines.installed import InstalledEngine, find_engines

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


def test_the_installed_peft_is_found() -> None:
    assert found("PyTorch with PEFT").version == version("peft")


def test_a_missing_engine_has_a_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "installed_version", lambda *_: None)
    for name in ("VLLM", "MLX", "OPENVINO"):
        monkeypatch.setenv(f"LORAOVER_{name}", "/nowhere")
    assert [engine.version for engine in find_engines()] == [None] * 7
    assert all(engine.install.startswith(("pip install ", "make ")) for engine in find_engines())


def test_vllm_in_another_environment_has_the_version_recorded_there(vllm: Path) -> None:
    record = vllm.parents[1] / "lib" / "python3.12" / "site-packages" / "vllm-0.99.0+cpu.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.99.0+cpu\n")
    assert found("vLLM").version == "0.99.0+cpu"


def test_a_command_without_a_recorded_version_is_named(vllm: Path) -> None:
    assert found("vLLM").version == f"found at {vllm}"


def test_vllm_on_the_path_is_found(vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAOVER_VLLM")
    monkeypatch.setenv("PATH", str(vllm.parent))
    assert found("vLLM").version == f"found at {vllm}"
