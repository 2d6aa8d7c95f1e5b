"""Faults planted in what an engine itself reads: a wrong prefix on each engine, and every fault on a running vLLM.

`test_verify_engines.py` plants the others on the engines that run without a server.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loraover.checkpoint.files import TENSORS_FILE
from loraover.common.errors import EngineError
from loraover_export.gguf import run as gguf_run
from loraover_export.mlx.run import export_mlx
from loraover_serve import EngineResult
from loraover_serve.engines import mlx, openvino
from loraover_serve.engines.answers import ADAPTER
from loraover_serve.engines.base import Setting
from loraover_serve.engines.vllm import export_uniform
from loraover_serve.judge.names import NOT_APPLIED, OTHER_BASE
from loraover_serve.verify.run import ask, verify_engine

from support.compatibility import PEFT
from support.engine_forms import Running, present, skip_unless_installed
from support.gguf_export import rewrite
from support.verified import FAULTS, WRONG_PREFIX, Case, Tensors, make_case, plant, save_adapter, save_base

pytestmark = pytest.mark.engine

READERS = ["onnx", pytest.param("vllm", marks=pytest.mark.matrix)]
"""Engines that get PEFT's files, or a graph that is made from them."""


def without_peft_prefix(tensors: Tensors) -> Tensors:
    return {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}


def as_peft_saved_it(engine: str, wrong: Path, case: Case, running: Running, scratch: Path) -> EngineResult:
    """Verify an engine that was given another adapter's files than the judge knows."""
    with present(engine, PEFT, replace(case.setting(scratch), adapters={ADAPTER: wrong}), running) as started:
        answers = ask(started, case.judge.reference)
    return case.judge.judge(engine, None, answers, 0.0)


@pytest.mark.usefixtures("quick_builder")
@pytest.mark.parametrize("engine", READERS)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_wrong_prefix_is_named(engine: str, case: Case, running: Running, tmp_path: Path) -> None:
    skip_unless_installed(engine)
    wrong = plant(WRONG_PREFIX, case.adapter, tmp_path / "wrong")
    found = as_peft_saved_it(engine, wrong, case, running, tmp_path)
    assert (found.verdict, found.fault) == ("differs", NOT_APPLIED), found.reason


@pytest.mark.matrix
@pytest.mark.parametrize("change", [without_peft_prefix, WRONG_PREFIX.change])
def test_openvino_needs_pefts_prefix_and_then_a_part_of_a_name(
    change: Callable[[Tensors], Tensors], case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_installed("openvino")

    def misplaced(setting: Setting) -> Path:
        folder = export_uniform(setting)
        save_file(change(load_file(folder / TENSORS_FILE)), folder / TENSORS_FILE)
        return folder

    monkeypatch.setattr(openvino, "export_uniform", misplaced)
    found = verify_engine("openvino", case.setting(tmp_path), case.judge)
    expected = ("differs", NOT_APPLIED) if change is without_peft_prefix else ("as trained", None)
    assert (found.verdict, found.fault) == expected, found.reason


@pytest.mark.matrix
def test_a_wrong_prefix_is_refused_by_mlx(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_installed("mlx")

    def misplaced(source: Path, output: Path, **options: Any) -> Any:
        report = export_mlx(source, output, **options)
        file = output / "adapters.safetensors"
        save_file(WRONG_PREFIX.change(load_file(file)), file)
        return report

    monkeypatch.setattr(mlx, "export_mlx", misplaced)
    with pytest.raises(EngineError, match="incompatible tensors"):
        verify_engine("mlx", case.setting(tmp_path), case.judge)


def test_a_wrong_prefix_is_refused_by_llamacpp(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export: Any = gguf_run.export_gguf

    def misplaced(source: Path, output: Path, **options: Any) -> Any:
        report = export(source, tmp_path / "right.gguf", **options)
        rewrite(tmp_path / "right.gguf", output, lambda fields, tensors: _rename(tensors))
        return report

    monkeypatch.setattr(gguf_run, "export_gguf", misplaced)
    with pytest.raises(EngineError, match=r"adapts layer\.0\.[a-z_.]+, which .* does not have"):
        verify_engine("llamacpp", case.setting(tmp_path), case.judge)


def _rename(tensors: dict[str, Any]) -> None:
    renamed = {name.replace("blk.", "layer."): tensor for name, tensor in tensors.items()}
    tensors.clear()
    tensors.update(renamed)


@pytest.mark.matrix
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_on_a_running_vllm(name: str, case: Case, running: Running, tmp_path: Path) -> None:
    wrong = plant(FAULTS[name], case.adapter, tmp_path / "wrong")
    found = as_peft_saved_it("vllm", wrong, case, running, tmp_path)
    assert (found.verdict, found.fault) == ("differs", FAULTS[name].fault), found.reason
    assert FAULTS[name].words in found.reason


@pytest.mark.matrix
def test_another_base_model_is_named_on_a_running_vllm(case: Case, running: Running, tmp_path: Path) -> None:
    """The server has the base model of the other faults; the judge expects another."""
    base = save_base(tmp_path / "expected", seed=7)
    mine = make_case(base, save_adapter(tmp_path / "mine", base))
    with present("vllm", PEFT, case.setting(tmp_path), running) as started:
        answers = ask(started, mine.judge.reference)
    found = mine.judge.judge("vllm", None, answers, 0.0)
    assert (found.verdict, found.fault) == ("differs", OTHER_BASE), found.reason
