"""Elements below the range of the type that an adapter is stored in: they are counted, and a lost matrix fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from loraover.adapters.numerics.matrix_certificate import certify, matrix_facts
from loraover.adapters.numerics.rounding import round_nearest
from loraover.checkpoint.exact_tensors import Exact
from loraover.common.command_line import run
from loraover_export.cli import cli

from strategies import normal
from support.adapters_on_disk import save_base, save_lora
from support.exports import ADAPTERS
from support.make_checkpoint import edit_tensors

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
    exact = Exact(value, value.new_zeros(()).expand_as(value), None)
    written = round_nearest(value, torch.float16)
    found = certify("m", written, exact)
    assert found.passed == passed
    assert found.flushed_to_zero == int((written == 0).sum())
    assert found.subnormal == int(((written != 0) & (written.double().abs() < 2.0**-14)).sum())
    facts = matrix_facts([found])
    assert facts["matrices"].startswith(f"{int(passed)} of 1")
    assert ("underflow" in facts) == bool(found.flushed_to_zero or found.subnormal)
    assert ("1 lost more than half" in facts.get("underflow", "")) != passed
