"""The check of an ONNX export: what goes wrong on the way ends in exit code 1, and where PyTorch computes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraover.adapters.numerics.delta import Delta
from loraover.adapters.verdict import largest
from loraover.checkpoint.checkpoint import read_checkpoint
from loraover.checkpoint.exact_tensors import Exact
from loraover.models.device import choose_compute
from loraover.models.load import load_model, resolve_model
from loraover_export.formats.onnx import run as export_module
from loraover_export.formats.onnx import swappable
from loraover_export.formats.onnx.check import Compute, OnnxReference, make_reference
from loraover_export.formats.onnx.kinds import decoder
from loraover_export.formats.onnx.kinds.base import GraphSession
from loraover_export.formats.onnx.kinds.decoder import Decoder
from loraover_export.formats.onnx.kinds.traced import Stateless
from loraover_export.formats.onnx.report import CaseError, GraphCheck, OnnxReport
from loraover_export.formats.onnx.swappable import write_adapter
from loraover_export.merge import arithmetic

from support.devices import ALL_DEVICES
from support.faults import Failure, Rounding, Scaling
from support.make_checkpoint import Made, make_checkpoint, tree
from support.no_memory import NO_MEMORY
from support.onnx_export import OnnxMade, export, read_report, tiny_lora
from support.refusals import Refused

pytestmark = pytest.mark.engine

MODES = ("merged", "swappable")
Mutant = Callable[[pytest.MonkeyPatch], object]
Rejected = Callable[..., OnnxReport]


@pytest.fixture
def rejected(onnx_made: OnnxMade, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Rejected:
    """Exports the adapter `first`, and checks all that a failed check promises; returns the report."""

    def check(mode: str, *options: str, names: Iterable[str] = ("first",)) -> OnnxReport:
        before = tree(onnx_made.folder)
        capfd.readouterr()
        sources = [onnx_made.folder / name for name in names]
        code = export(sources, tmp_path / "out", "--mode", mode, "--json", *options)
        out, err = capfd.readouterr()
        assert code == 1, err
        assert list(tmp_path.iterdir()) == []
        assert tree(onnx_made.folder) == before
        assert "nothing was written" in err
        found = OnnxReport.model_validate_json(out)
        assert found.verdict == "failed"
        return found

    return check


def changed(change: Callable[[Delta], Delta]) -> Mutant:
    """Another delta where adapters are written or merged; the unfolded model knows the right one."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = swappable.write_adapter

        def write(adapter: Path, layout: Any, graphs: Any, deltas: Iterable[Delta]) -> Any:
            return right(adapter, layout, graphs, [change(delta) for delta in deltas])

        monkeypatch.setattr(export_module, "write_adapter", write)
        product = Delta.product
        monkeypatch.setattr(Delta, "product", lambda delta: product(change(delta)))

    return patch


def scaled(factor: float) -> Callable[[Delta], Delta]:
    return lambda delta: replace(delta, b=Exact(delta.b.value * factor, delta.b.bound, delta.b.site))


@pytest.mark.parametrize("mode", MODES)
def test_another_delta_is_rejected(mode: str, monkeypatch: pytest.MonkeyPatch, rejected: Rejected) -> None:
    """The certificates pass, since they cover the rounding alone."""
    changed(scaled(1.0001))(monkeypatch)
    found = rejected(mode)
    assert all(matrix.passed for matrix in found.matrices)
    assert not next(check for check in found.checks if check.adapter == "first").passed


def test_a_configuration_that_we_misread_is_rejected(wrong_scaling: Scaling, rejected: Rejected) -> None:
    """The reference is read by PEFT, so it does not share our mistakes."""
    wrong_scaling(1.01)
    rejected("merged")


def merged_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificates are those of a merge, but the exported model is not the merged one."""
    monkeypatch.setattr(export_module, "merge", lambda model, *rest: arithmetic.merge(copy.deepcopy(model), *rest))


DROPPED: dict[str, Mutant] = {
    "merged": merged_elsewhere,
    "swappable": changed(scaled(0.0)),
}


@pytest.mark.parametrize("mode", MODES)
def test_an_int4_graph_without_its_adapter_is_rejected(
    mode: str, monkeypatch: pytest.MonkeyPatch, rejected: Rejected
) -> None:
    """The adapter moves logits by less than int4 may; only the check of its change shows that it is lost."""
    DROPPED[mode](monkeypatch)
    found = rejected(mode, "--precision", "int4", names=["second"])
    logits, change = (check for check in found.checks if check.adapter == "second")
    assert (logits.compared, logits.verdict) == ("logits", "inconclusive")
    assert logits.error < logits.bound
    assert (change.compared, change.verdict) == ("change", "failed")
    assert change.error == pytest.approx(change.adapter_effect)


@pytest.mark.parametrize(
    ("mode", "precision", "fate"),
    [("merged", "fp32", "dropped"), ("swappable", "int4", "dropped"), ("swappable", "fp32", "kept")],
)
def test_an_adapter_too_weak_for_the_check_is_inconclusive(
    mode: str,
    precision: str,
    fate: str,
    onnx_made: OnnxMade,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It would pass for one that does nothing, so an export that dropped it must not pass."""
    tiny_lora(onnx_made.base, tmp_path / "weak", lora_alpha=1e-6, alpha_pattern={})
    if fate == "dropped":
        DROPPED[mode](monkeypatch)
    capfd.readouterr()
    code = export(tmp_path / "weak", tmp_path / "out", "--mode", mode, "--precision", precision)
    output = capfd.readouterr().out
    assert code == 3, output
    assert "export inconclusive" in output
    assert f"wrote {tmp_path / 'out'}" in output
    report = read_report(tmp_path / "out")
    assert report.verdict == "inconclusive"
    assert {check.adapter for check in report.checks if check.passed} <= {None}


def exchanged(adapter: Path, *rest: Any) -> Any:
    """Write one of two adapters under the name of the other."""
    return write_adapter(adapter.with_name({"first": "second", "second": "first"}[adapter.name]), *rest)


def only_left_padding(found: OnnxReport) -> bool:
    wrong = [{case.case for case in check.cases if case.max_logit > check.bound} for check in found.checks]
    left = [{case.case for case in check.cases if "on the left" in case.case} for check in found.checks]
    return wrong == left


def greedy_part(found: OnnxReport) -> int | None:
    """Return the first token that differs in the last check, whose logits are right."""
    check = found.checks[-1]
    assert check.error <= check.bound
    assert check.greedy is not None
    return check.greedy.first_difference


session = GraphSession.__init__
generate: Callable[..., Tensor] = Decoder.generate
MISTAKES: dict[str, tuple[str, tuple[str, ...], tuple[Any, str, Any], Callable[[OnnxReport], bool]]] = {
    "two adapters under one another's names": (
        "swappable",
        ("first", "second"),
        (export_module, "write_adapter", exchanged),
        lambda found: [check.passed for check in found.checks] == [True, False, False],
    ),
    "an adapter that is not applied": (
        "swappable",
        ("first",),
        (GraphSession, "__init__", lambda self, graph, device, adapter=None: session(self, graph, device)),
        lambda found: [check.passed for check in found.checks] == [True, False],
    ),
    "no padding on the left": (
        "merged",
        ("first",),
        (decoder, "accept_left_padding", lambda model: False),
        only_left_padding,
    ),
    "decoding with the wrong adapter": (
        "swappable",
        ("first",),
        (Decoder, "generate", lambda self, *rest: generate(self, *rest[:-1], None)),
        lambda found: greedy_part(found) is not None,
    ),
    "a text that ends too soon": (
        "merged",
        ("first",),
        (Decoder, "generate", lambda *arguments: generate(*arguments)[:3]),
        lambda found: greedy_part(found) == 3,
    ),
}
"""Mistakes of an export or of onnxruntime-genai: the mode and the adapters, what is replaced, and how it shows."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_the_way_is_rejected(mistake: str, monkeypatch: pytest.MonkeyPatch, rejected: Rejected) -> None:
    mode, names, replaced, shows = MISTAKES[mistake]
    monkeypatch.setattr(*replaced)
    assert shows(rejected(mode, names=names))


def test_logits_that_are_no_numbers_are_rejected() -> None:
    """Python's `max` would keep the 1e-6 before the NaN."""
    cases = [CaseError(case=str(error), max_logit=error, mean_logit=error) for error in (1e-6, math.nan, 1e-6)]
    check = GraphCheck(adapter="a", cases=cases, noise=1e-6, noise_of="", adapter_effect=1.0, greedy=None)
    assert check.verdict == "failed"
    zero = torch.zeros(2)
    assert math.isnan(largest([zero, zero, zero], [zero, zero + math.nan, zero]))


@pytest.mark.parametrize("mode", MODES)
def test_a_matrix_beyond_its_bound_is_rejected(mode: str, wrong_rounding: Rounding, rejected: Rejected) -> None:
    """Less than logits show: one element, two units in the last place off."""

    def wrong(matrix: Tensor) -> Tensor:
        return matrix.index_put((torch.tensor(0), torch.tensor(0)), matrix[0, 0] * (1 + 2.0**-21))

    wrong_rounding(wrong, (swappable, "round_tensor"), (arithmetic, "round_nearest"))
    found = rejected(mode)
    assert all(check.passed for check in found.checks)
    assert not any(matrix.passed for matrix in found.matrices)


# Where PyTorch computes the reference


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
    source: Path, refused: Refused, failing_model: Failure
) -> None:
    failing_model(NO_MEMORY["Python"], "run")
    fits = "What would fit: --check-device cpu --compute-dtype bf16"
    named = ("the check in PyTorch ran out of memory on cpu", fits)
    refused("onnx", source, "--mode", "swappable", "--check-device", "cpu", named=named)
