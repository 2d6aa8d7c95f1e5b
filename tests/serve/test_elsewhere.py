"""Engines in environments of their own: which python runs them, and what becomes of their errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraover.common.errors import EngineError
from loraover_serve.engines.elsewhere import ElsewhereEngine, Runner
from loraover_serve.engines.mlx import MlxEngine
from loraover_serve.engines.openvino import OpenVinoEngine
from loraover_serve.verify.request import VerifyRequest

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
    running._process.kill()
    running._process.wait()
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
