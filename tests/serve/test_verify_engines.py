"""Verification on each engine that runs in this process: right adapters, and planted faults that it serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraover.common.errors import ExportError
from loraover_serve.verify.run import verify_engine

from support.make_checkpoint import Made
from support.verified import FAULTS, Case, make_case, plant, save_adapter, save_base

pytestmark = pytest.mark.engine

HERE = ("torch", "onnx", "llamacpp")
"""Engines that run in this process: a new one is a name here."""
REFUSED = {"llamacpp": {"modules_to_save"}}
"""Options of a LoRA with which an engine cannot be served."""
TELLING = ("scaling dropped", "transposed")
"""Faults that every run plants; `make test-engines` plants all."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("engines")
    base = save_base(folder / "base")
    return make_case(base, save_adapter(folder / "adapter", base))


@pytest.mark.parametrize("engine", HERE)
def test_a_checkpoint_is_as_trained(engine: str, made: Made, tmp_path: Path) -> None:
    case = make_case(made.base, made.path)
    found = verify_engine(engine, case.setting(tmp_path), case.court)
    assert (found.verdict, found.compared) == ("as trained", "all tokens"), found.reason


@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize(
    "lora", [{}, {"target_modules": ["embed_tokens", "q_proj", "down_proj"]}, {"modules_to_save": ["norm"]}]
)
def test_an_adapter_is_as_trained(engine: str, lora: dict[str, Any], case: Case, tmp_path: Path) -> None:
    mine = case if not lora else make_case(case.base, save_adapter(tmp_path / "adapter", case.base, **lora))
    if lora.keys() & REFUSED.get(engine, set()):
        with pytest.raises(ExportError):
            verify_engine(engine, mine.setting(tmp_path), mine.court)
        return
    found = verify_engine(engine, mine.setting(tmp_path), mine.court)
    assert found.verdict == "as trained", found.reason


@pytest.mark.parametrize("engine", HERE)
@pytest.mark.parametrize(
    "name", [name if name in TELLING else pytest.param(name, marks=pytest.mark.matrix) for name in FAULTS]
)
def test_a_planted_fault_is_found_and_named(engine: str, name: str, case: Case, tmp_path: Path) -> None:
    wrong = plant(FAULTS[name], case.adapter, tmp_path / "wrong")
    found = verify_engine(engine, case.setting(tmp_path, adapter=wrong), case.court)
    assert (found.verdict, found.fault) == ("differs", FAULTS[name].fault), found.reason
    assert FAULTS[name].words in found.reason


@pytest.mark.parametrize("engine", HERE)
def test_another_base_model_is_named(engine: str, case: Case, tmp_path: Path) -> None:
    other = case.setting(tmp_path, base=save_base(tmp_path / "other", seed=7))
    assert verify_engine(engine, other, case.court).fault == "another base model"
