"""Mutants of the fold that must not pass: one matrix each, or a file, as it would be with a mistake."""

from __future__ import annotations

from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraover.adapters.numerics import rounding
from loraover.checkpoint.peft_adapter import site_key
from loraover.checkpoint.tensor_file import save_arrays
from loraover.common.arrays import Array, as_array, as_tensor
from loraover.overparam.decompositions import Mpo
from loraover_export.fold.report import FoldCertificate

from support.faults import Fold, Rounding
from support.fold_cases import Q_A, Q_B
from support.make_checkpoint import Made, edit_json, edit_tensors, make_checkpoint, tree
from support.refusals import fold

pytestmark = pytest.mark.process


Change = Callable[[Tensor], Tensor]


def flipped(matrix: Tensor) -> Tensor:
    return matrix.index_put((torch.tensor(2), torch.tensor(1)), -matrix[2, 1])


def two_ulps(matrix: Tensor) -> Tensor:
    """Half a unit is allowed, plus less than one: the bound is relative, so up to a unit at the top of a binade."""
    element = matrix[2, 1]
    for _ in range(2):
        element = torch.nextafter(element, torch.tensor(9.0, dtype=matrix.dtype))
    return matrix.index_put((torch.tensor(2), torch.tensor(1)), element)


MATRIX_MUTANTS: dict[str, tuple[str, Change]] = {
    "scaled": (Q_B, lambda matrix: matrix * (1.001 if matrix.dtype == torch.float32 else 1.01)),
    "one element's sign": (Q_A, flipped),
    "transposed": (Q_A, lambda matrix: matrix.reshape(-1, len(matrix)).T.contiguous()),
    "zero": (Q_B, torch.zeros_like),
    "two units in the last place": (Q_B, two_ulps),
}


def assert_rejected(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> FoldCertificate:
    before = tree(made.path)
    assert fold(made.path, tmp_path / "out", "--json", *options) == 1
    assert list(tmp_path.iterdir()) == []
    assert tree(made.path) == before
    out, err = capsys.readouterr()
    assert "nothing was written" in err
    found = FoldCertificate.model_validate_json(out)
    assert found.verdict == "failed"
    return found


@pytest.mark.parametrize("mutant", MATRIX_MUTANTS)
def test_the_certificate_rejects_a_wrong_matrix(
    mutant: str, made: Made, tmp_path: Path, wrong_rounding: Rounding, capsys: pytest.CaptureFixture[str]
) -> None:
    guilty, change = MATRIX_MUTANTS[mutant]
    wrong_rounding(change, only=guilty)
    found = assert_rejected(made, tmp_path, capsys, "--dtype", "fp32" if change is two_ulps else "bf16")
    assert [site_key(m.name) for m in found.matrices if not m.passed] == [guilty]


def test_a_file_that_does_not_hold_the_certified_matrices_is_refused(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = Q_A

    def wrong(arrays: dict[str, Array], path: Path) -> None:
        save_arrays({**arrays, key: as_array(flipped(as_tensor(arrays[key])))}, path)

    monkeypatch.setattr(rounding, "save_arrays", wrong)
    assert fold(made.path, tmp_path / "out") != 0
    assert list(tmp_path.iterdir()) == []
    assert key in capsys.readouterr().err


@pytest.fixture
def wrong_contraction(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor]], None]:
    """Function that replaces the contraction of an MPO; it is given the right one before the arguments."""
    right = Mpo.contract
    return lambda wrong: monkeypatch.setattr(Mpo, "contract", partialmethod(wrong, right))


def test_a_contraction_that_is_not_trainings_is_refused(
    made: Made, tmp_path: Path, wrong_contraction: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(self: Mpo, right: Any, cores: Any, m: int, n: int) -> Tensor:
        first, *others = cores
        found: Tensor = right(self, [first.mT.reshape(first.shape), *others], m, n)
        return found

    wrong_contraction(wrong)
    assert fold(made.path, tmp_path / "out") == 2
    assert "contradicts its cores" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_check_error_rejects_a_contraction_that_is_wrong_everywhere(
    tmp_path: Path, wrong_contraction: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training, fold and certificate agree on it; only the unfolded model, which contracts nothing, does not."""
    wrong_contraction(lambda self, right, *arguments: 1.01 * right(self, *arguments))
    made = make_checkpoint(tmp_path / "made")
    (tmp_path / "empty").mkdir()
    found = assert_rejected(made, tmp_path / "empty", capsys, "--check-error")
    assert all(m.passed for m in found.matrices)


def edit_folded(key: str, change: Change) -> Callable[[Path], None]:
    file = "adapter_model.safetensors"
    return lambda folder: edit_tensors(folder / file, lambda found: found.update({key: change(found[key])}))


def rescale(folder: Path) -> None:
    edit_json(folder / "adapter_config.json", lambda config: config.update(lora_alpha=8.01))


def forget_rslora(folder: Path) -> None:
    edit_json(folder / "adapter_config.json", lambda config: config.update(use_rslora=False))


OTHER_MUTANTS: dict[str, tuple[dict[str, Any], Callable[[Path], None]]] = {
    "zero": ({}, edit_folded(*MATRIX_MUTANTS["zero"])),
    "alpha 8.01": ({}, rescale),
    "rslora forgotten": ({"use_rslora": True}, forget_rslora),
    "lora_bias": ({"lora_bias": True}, edit_folded(Q_B.replace("weight", "bias"), lambda bias: bias + 0.01)),
    "saved head": (
        {"modules_to_save": ["lm_head"]},
        edit_folded("base_model.model.lm_head.weight", lambda head: head * 1.001),
    ),
}


@pytest.mark.parametrize("mutant", OTHER_MUTANTS)
def test_check_error_alone_rejects_a_wrong_adapter(
    mutant: str, tmp_path: Path, wrong_fold: Fold, capsys: pytest.CaptureFixture[str]
) -> None:
    """The certificates are in order: PEFT runs the adapter, and the unfolded model disagrees."""
    lora, edit = OTHER_MUTANTS[mutant]
    made = make_checkpoint(tmp_path / "made", **lora)
    (tmp_path / "empty").mkdir()
    wrong_fold(edit)
    found = assert_rejected(made, tmp_path / "empty", capsys, "--check-error")
    assert all(m.passed for m in found.matrices)
    assert found.outputs is not None
    assert not found.outputs.passed
    assert found.outputs.error.max_logit > 30 * found.outputs.noise.max_logit
