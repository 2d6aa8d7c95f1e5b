"""Where and in which type PyTorch computes the reference of an ONNX export."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from loraover.checkpoint.checkpoint import read_checkpoint
from loraover.models.device import choose_compute
from loraover.models.load import load_model, resolve_model
from loraover_export.logits.deviation import largest
from loraover_export.onnx import export as export_module
from loraover_export.onnx.check import Compute, OnnxReference, make_reference
from loraover_export.onnx.kinds.stateless import Stateless

from support.devices import ALL_DEVICES
from support.make_checkpoint import Made, make_checkpoint
from support.no_memory import failing
from support.onnx_export import OnnxMade, export, read_report
from support.refusals import Refused

pytestmark = pytest.mark.engine

TYPES = ("fp32", "bf16", "fp16", "fp64")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_checkpoint(tmp_path_factory.mktemp("devices"), tokenizer=True)


@pytest.fixture(scope="module")
def reference(llama: Made) -> Callable[[str, str, str], OnnxReference]:
    """The reference of a tiny Llama's checkpoint by precision, device and type; the model stays as it was."""

    @cache
    def make(precision: str, device: str, dtype: str) -> OnnxReference:
        model, kind = load_model(resolve_model(str(llama.base))), Stateless()
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        cases = kind.cases((torch.arange(36) % 40 + 3).reshape(3, 12))
        compute = Compute(*choose_compute(device, dtype))
        found = make_reference(kind, model, read_checkpoint(llama.path), cases, precision, compute=compute)
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        return found

    return make


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [*(("fp32", dtype) for dtype in TYPES), ("fp16", "fp32"), ("fp16", "bf16"), ("int4", "fp32")],
)
@pytest.mark.parametrize("device", ALL_DEVICES)
def test_a_reference_lies_within_its_noise(
    device: str, precision: str, dtype: str, reference: Callable[[str, str, str], OnnxReference]
) -> None:
    if (device, dtype) == ("mps", "fp64"):
        pytest.skip("Apple GPUs have no float64")
    exact, found = reference(precision, "cpu", "fp64"), reference(precision, device, dtype)
    assert {logits.device.type for logits in found.logits} == {"cpu"}
    assert found.noise > 0
    assert largest(exact.logits, found.logits) <= 3 * found.noise


def test_a_coarser_type_has_more_noise(reference: Callable[[str, str, str], OnnxReference]) -> None:
    found = {dtype: reference("fp32", "cpu", dtype) for dtype in TYPES}
    assert found["fp64"].noise == found["fp32"].noise
    assert found["bf16"].noise > 2 * found["fp16"].noise > 100 * found["fp32"].noise
    assert found["bf16"].noise_of == "PyTorch in bfloat16 against float32"


def test_a_report_records_where_pytorch_ran(onnx_made: OnnxMade, tmp_path: Path) -> None:
    source, out = onnx_made.folder / "first", tmp_path / "out"
    assert export(source, out, "--mode", "swappable", "--check-device", "cpu", "--compute-dtype", "fp16") == 0
    report = read_report(out)
    assert (report.check_device, report.compute_dtype) == ("cpu", "fp16")


def test_out_of_memory_says_what_was_needed_and_what_would_fit(
    source: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "make_reference", failing("Python"))
    fits = "What would fit: --check-device cpu --compute-dtype bf16"
    named = ("the check in PyTorch ran out of memory on cpu", fits)
    refused("onnx", source, "--mode", "swappable", "--check-device", "cpu", named=named)
