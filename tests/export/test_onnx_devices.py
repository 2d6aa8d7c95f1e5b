"""Where and in which type PyTorch computes the reference of an ONNX export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraover.checkpoint.checkpoint import read_checkpoint
from loraover.common.errors import ConfigError
from loraover.models.device import choose_compute
from loraover.models.load import load_model, resolve_model
from loraover_export.onnx import export as export_module
from loraover_export.onnx.check import Compute, Reference, largest, make_reference
from loraover_export.onnx.kinds.stateless import Stateless
from loraover_export.onnx.request import OnnxRequest

from support.devices import ALL_DEVICES
from support.make_checkpoint import Made, make_checkpoint
from support.no_memory import NO_MEMORY, failing
from support.onnx_export import OnnxMade, export, read_report

pytestmark = pytest.mark.engine

TYPES = ("fp32", "bf16", "fp16", "fp64")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_checkpoint(tmp_path_factory.mktemp("devices"), tokenizer=True)


def reference(made: Made, precision: str, device: str, dtype: str) -> tuple[Reference, dict[str, Tensor], Any]:
    """The reference of a tiny Llama's checkpoint, with the model's weights before it and the model."""
    model, kind = load_model(resolve_model(str(made.base))), Stateless()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    cases = kind.cases(torch.arange(36) % 40 + 3)
    compute = Compute(*choose_compute(device, dtype))
    return make_reference(kind, model, read_checkpoint(made.path), cases, precision, compute=compute), before, model


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("device", ALL_DEVICES)
def test_a_reference_lies_within_its_noise_and_leaves_the_model(
    device: str, dtype: str, precision: str, llama: Made
) -> None:
    if (device, dtype) == ("mps", "fp64"):
        pytest.skip("Apple GPUs have no float64")
    exact, _, _ = reference(llama, precision, "cpu", "fp64")
    found, before, model = reference(llama, precision, device, dtype)
    assert {logits.device.type for logits in found.logits} == {"cpu"}
    assert found.noise > 0
    assert largest(exact.logits, found.logits) <= 3 * found.noise
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_coarser_type_has_more_noise(llama: Made) -> None:
    found = {dtype: reference(llama, "fp32", "cpu", dtype)[0] for dtype in TYPES}
    assert found["fp64"].noise == found["fp32"].noise
    assert found["bf16"].noise > 2 * found["fp16"].noise > 100 * found["fp32"].noise
    assert found["bf16"].noise_of == "PyTorch in bfloat16 against float32"


@pytest.mark.parametrize("options", [("--compute-dtype", "fp64"), ("--compute-dtype", "fp16")], ids=str)
def test_a_report_records_where_pytorch_ran(options: tuple[str, ...], made: OnnxMade, tmp_path: Path) -> None:
    source, out = made.folder / "first", tmp_path / "out"
    assert export(source, out, "--mode", "swappable", "--check-device", "cpu", *options) == 0
    report = read_report(out)
    assert (report.check_device, report.compute_dtype) == ("cpu", options[1])


@pytest.mark.parametrize("name", NO_MEMORY)
def test_out_of_memory_says_what_was_needed_and_what_would_fit(
    name: str, made: OnnxMade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_module, "make_reference", failing(name))
    source, out = made.folder / "first", tmp_path / "out"
    assert export(source, out, "--mode", "swappable", "--check-device", "cpu") == 2
    shown = capfd.readouterr().err
    assert "the check in PyTorch ran out of memory on cpu" in shown
    assert "What would fit: --check-device cpu --compute-dtype bf16" in shown
    assert not out.exists()


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no cuda:9 here"):
        OnnxRequest((Path("a"),), Path("out"), "merged", check_device="cuda:9")
