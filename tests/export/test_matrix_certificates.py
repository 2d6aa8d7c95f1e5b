"""Errors of stored matrices, measured in their own types as in float64, and elements below the range of a type."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loraover.adapters.numerics.delta import scale
from loraover.adapters.numerics.matrix_certificate import MatrixCertificate, certify, matrix_facts
from loraover.adapters.numerics.tensor_rounding import STORAGE_DTYPES, round_nearest
from loraover.checkpoint.exact_tensors import ExactArray
from loraover.checkpoint.tensor_file import first_difference, save_tensors
from loraover.common.arrays import as_array
from loraover.common.command_line import run
from loraover.common.errors import CheckpointError
from loraover_export.cli import cli

from strategies import normal
from support.adapters_on_disk import save_base, save_lora
from support.exports import ADAPTERS
from support.make_checkpoint import edit_tensors

SHAPE = (24, 40)
MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "ordinary": lambda drawn: 0.02 * drawn,
    "with zeros": lambda drawn: drawn * (drawn > 0),
    "all zeros": torch.zeros_like,
    "many magnitudes": lambda drawn: drawn * torch.logspace(-30, 4, SHAPE[1]),
    "squares overflow": lambda drawn: 1e25 * drawn,
    "squares underflow": lambda drawn: 1e-30 * drawn,
    "subnormal": lambda drawn: 1e-40 * drawn,
}


def drawn(name: str) -> Tensor:
    return MATRICES[name](torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))


def certificates(written: Tensor, value: Tensor) -> tuple[MatrixCertificate, MatrixCertificate]:
    """Certificates of a stored matrix as its own type and as float64 hold it."""
    narrow, wide = (
        certify("m", as_array(written), ExactArray(as_array(exact), None, None)) for exact in (value, value.double())
    )
    return narrow, wide


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("stored", STORAGE_DTYPES)
@pytest.mark.parametrize("name", MATRICES)
def test_both_measure_the_same(name: str, stored: str, dtype: str) -> None:
    value = drawn(name).to(STORAGE_DTYPES[stored])
    if float(value.abs().max()) > torch.finfo(STORAGE_DTYPES[dtype]).max:
        pytest.skip("beyond the range of the type")
    written = round_nearest(value, STORAGE_DTYPES[dtype])
    assert torch.equal(written, round_nearest(value.double(), STORAGE_DTYPES[dtype]))
    kept = written.clone()
    narrow, wide = certificates(written, value)
    assert torch.equal(written, kept), "measuring changes nothing"
    assert narrow.passed == wide.passed
    assert narrow.passed == (dtype != "fp16" or stored == "fp16" or name not in ("squares underflow", "subnormal"))
    for field in ("relative_error", "relative_bound", "worst_to_bound"):
        assert getattr(narrow, field) == pytest.approx(getattr(wide, field), rel=1e-5), field
    assert (narrow.flushed_to_zero, narrow.subnormal) == (wide.flushed_to_zero, wide.subnormal)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("is_kept", [False, True], ids=["rounded", "kept"])
@pytest.mark.parametrize("wrong", ["next number", "sign", "zero", "NaN"])
def test_a_wrong_element_is_refused(wrong: str, is_kept: bool, dtype: str) -> None:
    value = drawn("ordinary").to(STORAGE_DTYPES[dtype] if is_kept else torch.float32)
    written = round_nearest(value, STORAGE_DTYPES[dtype])
    element = written[3, 5].clone()
    # Of two neighbours, the one away from the exact value is further off than half their distance.
    away = math.copysign(math.inf, float(element.double() - value[3, 5].double()) or 1.0)
    written[3, 5] = {
        "next number": torch.nextafter(element, torch.tensor(away, dtype=element.dtype)),
        "sign": -element,
        "zero": torch.zeros_like(element),
        "NaN": torch.full_like(element, torch.nan),
    }[wrong]
    assert not any(certificate.passed for certificate in certificates(written, value))


@pytest.mark.parametrize("scaling", [1.0, 2.0, -4.0, 0.125, 1.5, 2.0**-20, 2.0**120, 0.0])
@pytest.mark.parametrize("stored", STORAGE_DTYPES)
@pytest.mark.parametrize("name", ["ordinary", "with zeros", "many magnitudes", "subnormal"])
def test_a_scaled_matrix_is_exact_or_in_float64(name: str, stored: str, scaling: float) -> None:
    value = drawn(name).to(STORAGE_DTYPES[stored]).nan_to_num()
    scaled = scale(ExactArray(as_array(value), None, None), scaling).tensors()
    assert torch.equal(scaled.value.double(), value.double() * scaling)
    assert scaled.value.dtype == torch.float64 or scaling not in (1.5, 0.0)


def test_a_file_is_compared_bit_for_bit(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("file") / "tensors.safetensors"
    tensors = {"a": torch.zeros(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.tensor(7)}
    save_tensors(tensors, file)
    assert first_difference(file, tensors) is None
    assert first_difference(file, tensors | {"a": -torch.zeros(3, 4)}) == "a"
    assert first_difference(file, tensors | {"d": torch.ones(1)}) == "d"
    assert first_difference(file, tensors | {"b": tensors["b"].view(torch.float16)}) == "b"
    assert first_difference(file, tensors | {"a": torch.zeros(4, 3)}) == "a"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert first_difference(file, tensors) is not None
    content[20] = 0xFF
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        first_difference(file, tensors)


TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("underflow") / "base")


def shrink(found: dict[str, Tensor]) -> None:
    """Make every B smaller than half of float16's smallest number."""
    for key in found:
        if "lora_B" in key:
            found[key] = found[key] * (1e-8 / float(found[key].abs().max()))


@pytest.mark.parametrize("verb", ["convert", "combine", "gguf", *ADAPTERS])
def test_an_adapter_whose_matrices_become_zero_is_not_written(
    verb: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_lora(base, tmp_path / "source")
    edit_tensors(source / TENSORS, shrink)
    before = sorted(tmp_path.iterdir())
    words = [verb, str(source), "-o", str(tmp_path / "out"), "--dtype"]
    assert run(cli, [*words, "fp16"]) == 1
    assert "nothing was written" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before
    assert run(cli, [*words, "bf16"]) == 0
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scale", "passed"), [(1.0, True), (1e-5, True), (1e-7, True), (1e-8, False), (1e-30, False), (1e-200, False)]
)
def test_a_matrix_may_lose_up_to_half_of_its_norm(scale: float, passed: bool) -> None:
    """At 1e-7, float16 has one or two numbers for each element; at 1e-200, the squares in a norm vanish as well."""
    value = scale * normal(1, 24, 40)
    written = round_nearest(value, torch.float16)
    found = certify("m", as_array(written), ExactArray(value.numpy(), None, None))
    assert found.passed == passed
    assert found.flushed_to_zero == int((written == 0).sum())
    assert found.subnormal == int(((written != 0) & (written.double().abs() < 2.0**-14)).sum())
    facts = matrix_facts([found])
    assert facts["matrices"].startswith(f"{int(passed)} of 1")
    assert ("underflow" in facts) == bool(found.flushed_to_zero or found.subnormal)
    assert ("1 lost more than half" in facts.get("underflow", "")) != passed
