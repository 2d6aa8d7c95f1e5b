"""The elements that a fold writes: each rounded once, at the edges of a type's range too."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loraover import LoraOverConfig

from support.fold_cases import DTYPES, Q_A, certificate, tensors
from support.make_checkpoint import EMBEDDING, edit_tensors, make_checkpoint, nearest, numpy64, oracle_matrices, reseal
from support.refusals import Refused, fold

pytestmark = pytest.mark.process


MODES = {"modes": {4: (4, 1, 1), 32: (2, 4, 4), 16: (1, 1, 16)}}


@pytest.mark.parametrize(
    ("dtype", "decomposition", "options", "training", "lora"),
    [
        ("fp32", "mpo", {}, torch.float64, {}),
        ("bf16", "mpo", MODES, torch.float32, {}),
        ("fp16", "mpo", {}, torch.float32, {}),
        ("fp32", "svd", {}, torch.float32, {}),
        ("bf16", "chain", {}, torch.float32, {}),
        ("bf16", "svd", {}, torch.float32, {"target_modules": EMBEDDING}),
    ],
    ids=str,
)
def test_every_element_is_correctly_rounded(
    dtype: str,
    decomposition: str,
    options: dict[str, Any],
    training: torch.dtype,
    lora: dict[str, Any],
    tmp_path: Path,
) -> None:
    """But the copy of a frozen embedding is the base model's, which PEFT loads it over."""
    config = LoraOverConfig(decomposition=decomposition, options=options, seed=5)
    made = make_checkpoint(tmp_path, config=config, dtype=training, **lora)
    assert fold(made.path, tmp_path / "out", "--dtype", dtype) == 0
    exact, written, stored = oracle_matrices(made.path), tensors(tmp_path / "out"), tensors(made.path)
    for key, matrix in exact.items():
        assert written[key].dtype == DTYPES[dtype]
        np.testing.assert_array_equal(numpy64(written[key]), nearest(matrix, dtype), err_msg=key)
    assert len(written.keys() - exact.keys()) == len(lora)
    for key in written.keys() - exact.keys():
        assert torch.equal(written[key], stored[key])
        assert written[key].dtype == training


def with_matrix(folder: Path, values: list[float]) -> Path:
    """A float64 checkpoint whose first q_proj A starts with these numbers: its only core is the matrix itself."""
    made = make_checkpoint(
        folder, config=LoraOverConfig(options={"num_cores": 1}, seed=5), dtype=torch.float64, steps=0
    )
    name = Q_A.removeprefix("base_model.model.").removesuffix(".weight")

    numbers = torch.tensor(values, dtype=torch.float64)
    for file, key in (("loraover.safetensors", f"{name}.core.0"), ("adapter_model.safetensors", Q_A)):
        edit_tensors(made.path / file, partial(overwrite, key, numbers))
    reseal(made.path)
    return made.path


def overwrite(key: str, numbers: Tensor, found: dict[str, Tensor]) -> None:
    found[key].view(-1)[: len(numbers)] = numbers


def test_fp16_reports_what_its_range_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = with_matrix(tmp_path, [2.0**-24, 3.3e-6, -1e-5, 6.1e-5, 6.2e-5, 2.0**-26, -1e-12])
    assert fold(source, tmp_path / "out", "--dtype", "fp16") == 0
    matrix = next(m for m in certificate(tmp_path / "out").matrices if m.name in Q_A)
    assert (matrix.flushed_to_zero, matrix.subnormal) == (2, 4)
    written = tensors(tmp_path / "out").items()
    total = sum(m.subnormal for m in certificate(tmp_path / "out").matrices)
    assert total == sum(int(((t != 0) & (t.double().abs() < 2.0**-14)).sum()) for _, t in written)
    assert f"fp16 range: 2 elements became zero, {total} are subnormal" in capsys.readouterr().out


FIRST_INFINITE = {"fp32": 2.0**128 - 2.0**103, "bf16": 2.0**128 - 2.0**119, "fp16": 65520.0}


@pytest.mark.parametrize("dtype", DTYPES)
def test_overflow_is_refused(dtype: str, tmp_path: Path, refused: Refused) -> None:
    source = with_matrix(tmp_path, [1.0, -FIRST_INFINITE[dtype]])
    assert refused("fold", source, "--dtype", dtype).startswith(f"error: {Q_A}: an element of")
