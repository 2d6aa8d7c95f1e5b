"""Elements below the range of the type that an adapter is stored in: they are counted, and a lost matrix fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraover.checkpoint.exact_tensors import Exact
from loraover_export import combine_adapters, convert_adapter, export_gguf, export_mlx, export_vllm
from loraover_export.numerics.certify import certify
from loraover_export.numerics.matrix_certificate import matrix_facts
from loraover_export.numerics.rounding import round_nearest

from strategies import normal
from support.adapters_on_disk import save_base, save_lora
from support.make_checkpoint import edit_tensors

TENSORS = "adapter_model.safetensors"
WRITERS: dict[str, Callable[..., Any]] = {
    "convert": convert_adapter,
    "combine": lambda source, out, **options: combine_adapters([source], out, **options),
    "vllm": export_vllm,
    "mlx": export_mlx,
    "gguf": export_gguf,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("underflow") / "base")


def shrink(found: dict[str, Tensor]) -> None:
    """Make every B smaller than half of float16's smallest number."""
    for key in found:
        if "lora_B" in key:
            found[key] = found[key] * (1e-8 / float(found[key].abs().max()))


@pytest.mark.parametrize("writer", WRITERS)
def test_an_adapter_whose_matrices_become_zero_is_not_written(writer: str, base: Path, tmp_path: Path) -> None:
    source = save_lora(base, tmp_path / "source")
    edit_tensors(source / TENSORS, shrink)
    for dtype, is_written in (("fp16", False), ("bf16", True)):
        WRITERS[writer](source, tmp_path / "out", dtype=dtype)
        assert (tmp_path / "out").exists() == is_written


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
