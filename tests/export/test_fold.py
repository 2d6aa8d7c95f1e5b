"""What a fold writes, read back: against the oracles, against PEFT, and against mutants that must not pass."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from loraover import LoraOverConfig, OverParameterization, read_checkpoint
from loraover.callbacks.loraover_callback import LoraOverCallback
from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.peft_adapter import site_key
from loraover.checkpoint.tensor_file import save_tensors
from loraover.common.command_line import run
from loraover.models.load import resolve_model
from loraover.overparam.decompositions import DECOMPOSITIONS, Mpo
from loraover_export.cli import cli
from loraover_export.fold import check_outputs as check_outputs_module
from loraover_export.fold import deviation
from loraover_export.fold import fold as fold_module
from loraover_export.fold import run as run_fold
from loraover_export.fold.certificate import FoldCertificate, judge
from loraover_export.fold.check_outputs import check_outputs
from loraover_export.fold.deviation import RunningDeviation
from loraover_export.fold.fold import write_folded
from loraover_export.numerics.matrix_certificate import MatrixCertificate
from loraover_export.numerics.rounding import round_tensor

from oracles.contraction import Array
from support.make_checkpoint import (
    EMBEDDING,
    LINEAR,
    Made,
    edit_json,
    edit_tensors,
    logits,
    lora_model,
    make_checkpoint,
    nearest,
    numpy64,
    oracle_matrices,
    reseal,
    save,
    train,
    tree,
)
from support.tiny_models import VOCABULARY, fill_b, token_ids

pytestmark = pytest.mark.process

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LORA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR},
    "rslora": {"use_rslora": True, "r": 2},
    "patterns": {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}},
    "embedding": {"target_modules": EMBEDDING},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all", "base_options": {"attention_bias": True}},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
FILES = ADAPTER | {"fold_certificate.json", "fold.html", "figures", "README.md"}
Q_A, Q_B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{kind}.weight" for kind in "AB")


def fold(source: Path, output: Path, *options: str) -> int:
    return run(cli, ["fold", str(source), "-o", str(output), *options])


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def certificate(folder: Path) -> FoldCertificate:
    return FoldCertificate.model_validate_json((folder / "fold_certificate.json").read_bytes())


def load_base(made: Made) -> Any:
    return AutoModelForCausalLM.from_pretrained(made.base)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An MPO checkpoint in fp32 on q_proj and v_proj; tests read it only."""
    return make_checkpoint(tmp_path_factory.mktemp("made"), tokenizer=True)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("lora", LORA)
def test_every_site_is_the_oracles_contraction(lora: str, decomposition: str, tmp_path: Path) -> None:
    config = LoraOverConfig(decomposition=decomposition, seed=5)
    made = make_checkpoint(tmp_path, config=config, **LORA[lora])
    before = tree(made.path)
    assert fold(made.path, tmp_path / "out") == 0
    assert tree(made.path) == before
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    exact, written, stored = oracle_matrices(made.path), tensors(tmp_path / "out"), tensors(made.path)
    assert written.keys() == stored.keys() >= exact.keys()
    assert len(exact) == len(made.over.sites)
    for key, matrix in exact.items():
        error = float(np.linalg.norm(numpy64(written[key]) - matrix) / np.linalg.norm(matrix))
        assert error <= 1e-6, key
        assert written[key].dtype == torch.float32
        assert float(np.linalg.norm(matrix)) > 1e-3, key
    assert all(torch.equal(written[key], stored[key]) for key in written.keys() - exact.keys())


@pytest.mark.parametrize("lora", LORA)
def test_peft_loads_the_fold_with_the_training_models_logits(lora: str, tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, **LORA[lora])
    assert fold(made.path, tmp_path / "out") == 0
    model = PeftModel.from_pretrained(load_base(made), tmp_path / "out").eval()
    # training rounds its contraction to fp32 in another order: a few 2^-24 in logits below 1
    assert float((logits(model) - made.logits()).abs().max()) < 1e-6
    with model.disable_adapter():
        assert float((logits(model) - made.logits()).abs().max()) > 1e-3


@pytest.mark.parametrize("lora", LORA)
def test_the_configuration_is_that_of_the_checkpoint(lora: str, tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, steps=0, **LORA[lora])
    assert fold(made.path, tmp_path / "out") == 0
    expected, found = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (made.path, tmp_path / "out")
    )
    assert found == {**expected, "inference_mode": True}
    for name in ADAPTER:
        assert b"loraover" not in (tmp_path / "out" / name).read_bytes().lower()


@pytest.mark.parametrize("options", [{}, {"modes": {4: (4, 1, 1), 32: (2, 4, 4), 16: (1, 1, 16)}}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_element_is_correctly_rounded(
    training: torch.dtype, dtype: str, options: dict[str, Any], tmp_path: Path
) -> None:
    made = make_checkpoint(tmp_path, config=LoraOverConfig(options=options, seed=5), dtype=training)
    assert fold(made.path, tmp_path / "out", "--dtype", dtype) == 0
    written = tensors(tmp_path / "out")
    for key, matrix in oracle_matrices(made.path).items():
        assert written[key].dtype == DTYPES[dtype]
        np.testing.assert_array_equal(numpy64(written[key]), nearest(matrix, dtype), err_msg=key)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decomposition", ["svd", "chain"])
def test_every_element_is_correctly_rounded_in_other_decompositions(
    decomposition: str, dtype: str, tmp_path: Path
) -> None:
    made = make_checkpoint(tmp_path, config=LoraOverConfig(decomposition=decomposition, seed=5))
    assert fold(made.path, tmp_path / "out", "--dtype", dtype) == 0
    for key, matrix in oracle_matrices(made.path).items():
        np.testing.assert_array_equal(numpy64(tensors(tmp_path / "out")[key]), nearest(matrix, dtype), err_msg=key)


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


HALF = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_near_ties_and_subnormals_round_once(dtype: str, tmp_path: Path) -> None:
    """Rounding through float32 on the way to bf16 or fp16 gets the near ties wrong."""
    half, tiny = HALF[dtype], {"fp32": 2.0**-149, "bf16": 2.0**-133, "fp16": 2.0**-24}[dtype]
    cases = {
        1 + half: 1.0,
        1 + 3 * half: 1 + 4 * half,
        1 + half + 2.0**-45: 1 + 2 * half,
        1 + half - 2.0**-45: 1.0,
        1 + 3 * half - 2.0**-45: 1 + 2 * half,
        -1 - half - 2.0**-45: -1 - 2 * half,
        tiny: tiny,
        tiny / 2: 0.0,
        tiny / 2 * (1 + 2.0**-40): tiny,
        -1.5 * tiny: -2 * tiny,
        2.5 * tiny * (1 - 2.0**-40): 2 * tiny,
        0.49 * tiny: 0.0,
        1e-300: 0.0,
        0.0: 0.0,
    }
    source = with_matrix(tmp_path, list(cases))
    assert fold(source, tmp_path / "out", "--dtype", dtype) == 0
    found = tensors(tmp_path / "out")[Q_A].view(-1)[: len(cases)].double().tolist()
    assert dict(zip(cases, found, strict=True)) == cases
    matrix = certificate(tmp_path / "out").matrices[0]
    assert matrix.name in Q_A
    assert matrix.flushed_to_zero == 3
    assert matrix.subnormal == 4


def test_fp16_reports_what_its_range_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = with_matrix(tmp_path, [2.0**-24, 3.3e-6, -1e-5, 6.1e-5, 6.2e-5, 2.0**-26, -1e-12])
    assert fold(source, tmp_path / "out", "--dtype", "fp16") == 0
    matrix = next(m for m in certificate(tmp_path / "out").matrices if m.name in Q_A)
    assert (matrix.flushed_to_zero, matrix.subnormal) == (2, 4)
    written = tensors(tmp_path / "out").items()
    total = sum(m.subnormal for m in certificate(tmp_path / "out").matrices)
    assert total == sum(int(((t != 0) & (t.double().abs() < 2.0**-14)).sum()) for _, t in written)
    assert f"fp16 range: 2 elements became zero, {total} are subnormal" in capsys.readouterr().out


LARGEST = {"fp32": 2.0**128 - 2.0**104, "bf16": 2.0**128 - 2.0**120, "fp16": 65504.0}
FIRST_INFINITE = {"fp32": 2.0**128 - 2.0**103, "bf16": 2.0**128 - 2.0**119, "fp16": 65520.0}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_number_is_kept(dtype: str, tmp_path: Path) -> None:
    below = np.nextafter(FIRST_INFINITE[dtype], 0.0)
    assert fold(with_matrix(tmp_path, [LARGEST[dtype], -float(below)]), tmp_path / "out", "--dtype", dtype) == 0
    assert tensors(tmp_path / "out")[Q_A][0, :2].double().tolist() == [LARGEST[dtype], -LARGEST[dtype]]


@pytest.mark.parametrize("value", ["just", "far"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_overflow_is_refused(dtype: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = with_matrix(tmp_path, [1.0, -FIRST_INFINITE[dtype] if value == "just" else 1e300])
    assert fold(source, tmp_path / "out", "--dtype", dtype) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {Q_A}: an element of")
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_zero_folds_to_zero(decomposition: str, tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, config=LoraOverConfig(decomposition=decomposition, seed=5))
    site = Q_B.removeprefix("base_model.model.").removesuffix(".weight")

    def clear(prefix: str) -> Callable[[dict[str, Tensor]], None]:
        def change(found: dict[str, Tensor]) -> None:
            next(tensor for key, tensor in found.items() if key.startswith(prefix)).zero_()

        return change

    edit_tensors(made.path / "loraover.safetensors", clear(f"{site}.core.1"))
    edit_tensors(made.path / "adapter_model.safetensors", clear(Q_B))
    reseal(made.path)
    assert fold(made.path, tmp_path / "out") == 0
    assert not tensors(tmp_path / "out")[Q_B].any()
    matrix = next(m for m in certificate(tmp_path / "out").matrices if m.name == site)
    assert (matrix.relative_error, matrix.flushed_to_zero) == (0, 0)


def test_a_fold_repeats_bit_for_bit(made: Made, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert fold(made.path, tmp_path / name) == 0
    one, two = (tree(tmp_path / name) for name in ("one", "two"))
    assert {name for name in one if one[name] != two[name]} == {"README.md", "fold.html"}, "which name the output"


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_certificate_states_the_true_error_below_a_true_bound(
    dtype: str, decomposition: str, tmp_path: Path
) -> None:
    config = LoraOverConfig(decomposition=decomposition, sites=["*.lora_A", "*.q_proj.lora_B"], seed=5)
    made = make_checkpoint(tmp_path, config=config, target_modules=LINEAR)
    assert fold(made.path, tmp_path / "out", "--dtype", dtype) == 0
    found, exact, written = certificate(tmp_path / "out"), oracle_matrices(made.path), tensors(tmp_path / "out")
    assert found.verdict == "passed"
    assert (found.dtype, found.decomposition, found.step, found.seed) == (dtype, decomposition, 2, 5)
    assert found.base_model == str(made.base)
    assert found.outputs is None
    stored = tensors(made.path)
    assert [site_key(m.name) for m in found.matrices] == list(stored)
    for matrix in found.matrices:
        key = site_key(matrix.name)
        assert matrix.over_parameterised == (key in exact)
        assert matrix.shape == tuple(stored[key].shape)
        reference: Array = exact.get(key, numpy64(stored[key]))
        error = np.linalg.norm(numpy64(written[key]) - reference) / np.linalg.norm(reference)
        assert matrix.relative_error == pytest.approx(error, rel=1e-5, abs=1e-13)
        assert matrix.relative_error <= matrix.relative_bound
        assert 0 <= matrix.worst_to_bound <= 1
        # one rounding to nearest is at most u |M|, and fp16 loses up to half a subnormal
        u, tiny = HALF[dtype], {"fp32": 2.0**-150, "bf16": 2.0**-134, "fp16": 2.0**-25}[dtype]
        assert matrix.relative_bound < 1.001 * np.linalg.norm(u * abs(reference) + tiny) / np.linalg.norm(reference)


def test_an_unknown_field_is_no_certificate(made: Made, tmp_path: Path) -> None:
    assert fold(made.path, tmp_path / "out") == 0
    text = (tmp_path / "out" / "fold_certificate.json").read_text()
    with pytest.raises(ValidationError):
        FoldCertificate.model_validate({**json.loads(text), "extra": 1})


def test_the_card_names_the_base_its_licence_the_command_and_the_figures(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path)
    (made.base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert fold(made.path, tmp_path / "out", "--dtype", "bf16") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'license: "apache-2.0"' in card
    assert f'base_model: "{made.base}"' in card
    assert f"loraover-export fold {made.path} -o {tmp_path / 'out'} --dtype bf16" in card
    assert "8 of 8 within their bounds" in card


# Mutants of the fold: one matrix each, as it would be with a mistake.

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
    "doubled": (Q_A, lambda matrix: matrix * 2),
    "one element's sign": (Q_A, flipped),
    "ranks permuted in A only": (Q_A, lambda matrix: matrix[[1, 0, 2, 3]]),
    "ranks permuted in B only": (Q_B, lambda matrix: matrix[:, [1, 0, 2, 3]]),
    "transposed": (Q_A, lambda matrix: matrix.reshape(-1, len(matrix)).T.contiguous()),
    "zero": (Q_B, torch.zeros_like),
}
NAMED_MUTANTS = [*MATRIX_MUTANTS, "core transposed", "another adapter"]


@pytest.fixture(scope="module")
def matrix_mutants(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Change]]:
    """All of them, with those that need files: a transposed core, and an adapter trained one step further."""
    copy = tmp_path_factory.mktemp("mutant") / "checkpoint"
    shutil.copytree(made.path, copy)
    core = Q_A.removeprefix("base_model.model.").removesuffix(".weight") + ".core.0"

    def transpose(found: dict[str, Tensor]) -> None:
        found[core] = found[core].T.reshape(found[core].shape)

    edit_tensors(copy / "loraover.safetensors", transpose)
    other = make_checkpoint(tmp_path_factory.mktemp("other"), steps=3)
    wrong, further = torch.from_numpy(oracle_matrices(copy)[Q_A]), torch.from_numpy(oracle_matrices(other.path)[Q_A])
    return MATRIX_MUTANTS | {
        "core transposed": (Q_A, lambda matrix: wrong.to(matrix.dtype)),
        "another adapter": (Q_A, lambda matrix: further.to(matrix.dtype)),
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


@pytest.mark.parametrize("mutant", [*NAMED_MUTANTS, "two units in the last place"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_certificate_rejects_a_wrong_matrix(
    mutant: str,
    dtype: str,
    made: Made,
    matrix_mutants: dict[str, tuple[str, Change]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    guilty, change = (matrix_mutants | {"two units in the last place": (Q_B, two_ulps)})[mutant]
    right = round_tensor

    def wrong(key: str, exact: Tensor, dtype: str) -> Tensor:
        matrix = right(key, exact, dtype)
        return change(matrix) if key == guilty else matrix

    monkeypatch.setattr(fold_module, "round_tensor", wrong)
    found = assert_rejected(made, tmp_path, capsys, "--dtype", dtype)
    assert [site_key(m.name) for m in found.matrices if not m.passed] == [guilty]


@pytest.mark.parametrize("mutant", NAMED_MUTANTS)
def test_a_file_that_does_not_hold_the_certified_matrices_is_refused(
    mutant: str,
    made: Made,
    matrix_mutants: dict[str, tuple[str, Change]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    key, change = matrix_mutants[mutant]

    def wrong(tensors: dict[str, Tensor], path: Path) -> None:
        save_tensors({**tensors, key: change(tensors[key]).contiguous()}, path)

    monkeypatch.setattr(fold_module, "save_tensors", wrong)
    assert fold(made.path, tmp_path / "out") != 0
    assert list(tmp_path.iterdir()) == []
    assert key in capsys.readouterr().err


def test_a_contraction_that_is_not_trainings_is_refused(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contract = Mpo.contract

    def wrong(self: Mpo, cores: Any, m: int, n: int) -> Tensor:
        first, *others = cores
        return contract(self, [first.mT.reshape(first.shape), *others], m, n)

    monkeypatch.setattr(Mpo, "contract", wrong)
    assert fold(made.path, tmp_path / "out") == 2
    assert "contradicts its cores" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_check_error_rejects_a_contraction_that_is_wrong_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training, fold and certificate agree on it; only the unfolded model, which contracts nothing, does not."""
    contract = Mpo.contract
    monkeypatch.setattr(Mpo, "contract", lambda *arguments: 1.01 * contract(*arguments))
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
    "alpha 8.01": ({}, rescale),
    "rslora forgotten": ({"use_rslora": True}, forget_rslora),
    "lora_bias": ({"lora_bias": True}, edit_folded(Q_B.replace("weight", "bias"), lambda bias: bias + 0.01)),
    "saved head": (
        {"modules_to_save": ["lm_head"]},
        edit_folded("base_model.model.lm_head.weight", lambda head: head * 1.001),
    ),
}


@pytest.mark.parametrize("mutant", [*NAMED_MUTANTS, *OTHER_MUTANTS])
def test_check_error_alone_rejects_a_wrong_adapter(
    mutant: str,
    matrix_mutants: dict[str, tuple[str, Change]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The certificates are in order: PEFT runs the adapter, and the unfolded model disagrees."""
    lora, edit = OTHER_MUTANTS[mutant] if mutant in OTHER_MUTANTS else ({}, edit_folded(*matrix_mutants[mutant]))
    made = make_checkpoint(tmp_path / "made", **lora)
    (tmp_path / "empty").mkdir()

    def wrong(checkpoint: Checkpoint, directory: Path, *rest: Any) -> list[MatrixCertificate]:
        certificates = write_folded(checkpoint, directory, *rest)
        edit(directory)
        return certificates

    monkeypatch.setattr(run_fold, "write_folded", wrong)
    found = assert_rejected(made, tmp_path / "empty", capsys, "--check-error")
    assert all(m.passed for m in found.matrices)
    assert found.outputs is not None
    assert not found.outputs.passed
    assert found.outputs.error.max_logit > 30 * found.outputs.noise.max_logit


def test_the_outputs_accept_the_fold(made: Made, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(made.path)
    write_folded(checkpoint, tmp_path, "fp32")
    found = check_outputs(checkpoint, tmp_path, "fp32", resolve_model(str(made.base)), None)
    assert found.passed
    assert found.adapter_effect > 1e-2
    assert 0 < found.noise.max_logit < 1e-5


@pytest.mark.parametrize("lora", LORA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_check_error_accepts_every_fold(lora: str, dtype: str, tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, **LORA[lora])
    before = tree(made.path) | tree(made.base)
    assert fold(made.path, tmp_path / "out", "--check-error", "--dtype", dtype) == 0
    assert tree(made.path) | tree(made.base) == before
    outputs = certificate(tmp_path / "out").outputs
    assert outputs is not None
    assert outputs.error.max_logit <= outputs.bound == certificate(tmp_path / "out").output_bound
    assert outputs.adapter_effect > 5 * outputs.bound
    assert outputs.tokens == 8 * 32
    assert "no tokenizer" in outputs.prompt_source


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("training", [torch.float64, torch.bfloat16], ids=str)
def test_check_error_accepts_every_decomposition_and_training_dtype(
    decomposition: str, training: torch.dtype, tmp_path: Path
) -> None:
    made = make_checkpoint(tmp_path, config=LoraOverConfig(decomposition=decomposition, seed=5), dtype=training)
    assert fold(made.path, tmp_path / "out", "--check-error") == 0


@pytest.mark.parametrize("seed", range(5))
def test_check_error_accepts_a_deep_chain(seed: int, tmp_path: Path) -> None:
    """The reference applies eight cores, the folded adapter two matrices; their difference is not an error of the fold.

    Between the cores, bonds are stretched in some directions and shrunk again, which changes no matrix, and multiplies
    what a reference in float32 would round away.
    """
    config = LoraOverConfig(decomposition="chain", options={"depth": 8}, seed=seed)
    made = make_checkpoint(tmp_path, config=config, target_modules=LINEAR, tokenizer=True)
    rng = np.random.default_rng(seed)

    def turn(found: dict[str, Tensor]) -> None:
        for site in dict.fromkeys(key.rpartition(".core.")[0] for key in found if ".core." in key):
            for k in range(7):
                left, right = f"{site}.core.{k}", f"{site}.core.{k + 1}"
                p, q = (np.linalg.qr(rng.standard_normal((found[left].shape[1],) * 2))[0] for _ in range(2))
                gauge = torch.from_numpy(p * 2.0 ** rng.integers(-3, 4, len(p)) @ q)
                found[left] = (found[left].double() @ gauge).float()
                found[right] = torch.linalg.solve(gauge, found[right].double()).float()

    edit_tensors(made.path / "loraover.safetensors", turn)
    matrices = {key: torch.from_numpy(matrix).float() for key, matrix in oracle_matrices(made.path).items()}
    edit_tensors(made.path / "adapter_model.safetensors", lambda found: found.update(matrices))
    reseal(made.path)
    assert fold(made.path, tmp_path / "out", "--check-error") == 0


def weak_adapter(folder: Path) -> Made:
    """It changes logits by less than float32 rounds, and by more than nothing."""
    return make_checkpoint(folder, lora_alpha=1e-6, tokenizer=True)


@pytest.mark.parametrize("fate", ["kept", "dropped"])
def test_check_error_is_inconclusive_of_an_adapter_too_weak_for_it(
    fate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter that does nothing would pass, so neither does. What was certified by itself is left in place."""
    made = weak_adapter(tmp_path / "made")

    def write(checkpoint: Checkpoint, directory: Path, *rest: Any) -> list[MatrixCertificate]:
        certificates = write_folded(checkpoint, directory, *rest)
        edit_folded(Q_B, torch.zeros_like if fate == "dropped" else torch.clone)(directory)
        return certificates

    monkeypatch.setattr(run_fold, "write_folded", write)
    assert fold(made.path, tmp_path / "out", "--check-error", "--dtype", "bf16") == 3
    out = capsys.readouterr().out
    assert "fold inconclusive" in out
    assert f"wrote {tmp_path / 'out'}" in out
    found = certificate(tmp_path / "out")
    assert found.verdict == "inconclusive"
    assert found.outputs is not None
    assert 0 < found.outputs.adapter_effect < 2 * found.outputs.bound


@pytest.mark.parametrize(
    ("error", "effect", "verdict"),
    [(1.0, 2.0, "passed"), (1.0, 1.99, "inconclusive"), (1.01, 9.0, "failed"), (1.01, 0.0, "failed")],
)
def test_a_verdict_is_conclusive_if_the_adapters_loss_would_be_noticed(
    error: float, effect: float, verdict: str
) -> None:
    assert judge(error, 1.0, effect) == verdict


def test_logits_that_are_no_numbers_fail() -> None:
    assert judge(float("nan"), 1.0, 9.0) == "failed"
    found = torch.ones(3, 5)
    running = RunningDeviation()
    for other in (found, found.index_fill(1, torch.tensor(2), float("nan")), found):
        running.add(found, other)
    assert math.isnan(running.result().max_logit)


def test_check_error_needs_room_for_noise(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict is the measured noise's, not a constant: without room above it, the same fold fails."""
    monkeypatch.setattr("loraover_export.fold.certificate.NOISE_FACTOR", 1e-3)
    assert fold(made.path, tmp_path / "out", "--check-error") == 1
    assert not (tmp_path / "out").exists()


def test_a_copy_of_the_base_model_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_checkpoint(tmp_path)
    moved = made.base.rename(tmp_path / "moved")
    assert fold(made.path, tmp_path / "out", "--check-error") == 2
    assert str(made.base) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert fold(made.path, tmp_path / "out", "--check-error", "--model", str(moved)) == 0
    outputs = certificate(tmp_path / "out").outputs
    assert outputs is not None
    assert outputs.base == f"folder {moved}"
    assert certificate(tmp_path / "out").base_model == str(made.base)


def test_prompts_are_read_one_a_line(made: Made, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the train leaves at nine\n\n   \na farmer has 17 sheep\nred\n")
    assert fold(made.path, tmp_path / "out", "--check-error", "--prompts", str(prompts)) == 0
    outputs = certificate(tmp_path / "out").outputs
    assert outputs is not None
    assert (outputs.prompts, outputs.tokens) == (3, 5 + 5 + 1)
    assert outputs.prompt_source == "3 of the prompts of prompts.txt"


@pytest.fixture
def live_logits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of all logits that are held whenever a model has been run."""
    seen: list[int] = []
    held: dict[int, int] = {}
    run_model = check_outputs_module.logits_of

    def counted(*arguments: Any) -> Tensor:
        found = run_model(*arguments)
        held[id(found)] = found.numel()
        weakref.finalize(found, held.pop, id(found))
        seen.append(sum(held.values()))
        return found

    monkeypatch.setattr(check_outputs_module, "logits_of", counted)
    return seen


@pytest.mark.parametrize(("count", "batches"), [(2, 1), (30, 8)])
def test_memory_does_not_grow_with_the_prompts(
    count: int, batches: int, made: Made, tmp_path: Path, live_logits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most the three twins' logits of as many prompts as run at once, four here."""
    monkeypatch.setitem(check_outputs_module.LOGITS_AT_ONCE, "cpu", 20 * VOCABULARY)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the train leaves at nine\n" * count)
    assert fold(made.path, tmp_path / "out", "--check-error", "--prompts", str(prompts), "--device", "cpu") == 0
    assert len(live_logits) == 6 * batches
    assert max(live_logits) == 3 * min(4, count) * 5 * VOCABULARY
    outputs = certificate(tmp_path / "out").outputs
    assert outputs is not None
    assert (outputs.prompts, outputs.tokens, outputs.compared_tokens) == (count, 5 * count, 5 * count)


def test_memory_does_not_grow_with_a_long_prompt(
    made: Made, tmp_path: Path, live_logits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces give the same figures as one pass, but for the rounding of other sums."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the train leaves at nine and a farmer has 17 sheep red blue " * 3)
    options = ("--check-error", "--prompts", str(prompts), "--dtype", "bf16", "--device", "cpu")
    assert fold(made.path, tmp_path / "whole", *options) == 0
    assert max(live_logits) == 3 * 39 * VOCABULARY
    live_logits.clear()
    monkeypatch.setitem(check_outputs_module.LOGITS_AT_ONCE, "cpu", 5 * VOCABULARY)
    monkeypatch.setattr(deviation, "ELEMENTS_AT_ONCE", 2 * VOCABULARY)
    assert fold(made.path, tmp_path / "pieces", *options) == 0
    assert max(live_logits) == 3 * 5 * VOCABULARY
    assert len(live_logits) == 6 * 8
    whole, pieces = (certificate(tmp_path / name).outputs for name in ("whole", "pieces"))
    assert whole is not None
    assert pieces is not None
    assert (pieces.prompts, pieces.tokens) == (1, 39)
    for one, other in ((whole.error, pieces.error), (whole.noise, pieces.noise)):
        assert one.model_dump() == pytest.approx(other.model_dump(), rel=1e-2)
    assert pieces.adapter_effect == pytest.approx(whole.adapter_effect, rel=1e-5)


def test_the_base_model_is_left_as_it_was_by_an_adapter_with_biases(tmp_path: Path) -> None:
    """PEFT loads them into the base model, on whose weights the unfolded model and the plain one run too."""
    made = make_checkpoint(tmp_path, bias="all", base_options={"attention_bias": True}, tokenizer=True)
    key = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"
    edit_tensors(made.path / "adapter_model.safetensors", lambda found: found.update({key: found[key] + 1.0}))
    reseal(made.path)
    assert fold(made.path, tmp_path / "out", "--check-error") == 0
    outputs = certificate(tmp_path / "out").outputs
    assert outputs is not None
    model = PeftModel.from_pretrained(load_base(made), made.path).eval()
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        effect = float((model(input_ids=ids).logits - load_base(made)(input_ids=ids).logits).abs().max())
    assert outputs.adapter_effect > 0.1 * effect > 10 * outputs.bound


# Output that exists


def test_force_replaces_a_folded_adapter_whole(made: Made, tmp_path: Path) -> None:
    assert fold(made.path, tmp_path / "out", "--dtype", "bf16") == 0
    (tmp_path / "out" / "stray").write_text("of the older adapter")
    assert fold(made.path, tmp_path / "out") == 2
    assert certificate(tmp_path / "out").dtype == "bf16"
    assert fold(made.path, tmp_path / "out", "--force") == 0
    assert certificate(tmp_path / "out").dtype == "fp32"
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_fold_that_fails_leaves_the_older_adapter(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fold(made.path, tmp_path / "out") == 0
    before = tree(tmp_path)
    right = round_tensor
    monkeypatch.setattr(fold_module, "round_tensor", lambda *arguments: 2 * right(*arguments))
    assert fold(made.path, tmp_path / "out", "--force") == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["checkpoint", "folder", "file", "link"])
def test_force_replaces_folded_adapters_only(
    kind: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    match kind:
        case "checkpoint":
            shutil.copytree(made.path, target)
        case "folder":
            target.mkdir()
            (target / "mine").touch()
        case "file":
            target.write_text("mine")
        case _:
            target.symlink_to(made.path)
    before = tree(tmp_path)
    assert fold(made.path, target, "--force") == 2
    assert str(target) in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_force_spares_the_input(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fold(made.path, tmp_path / "out") == 0
    inner = shutil.copytree(made.path, tmp_path / "out" / "checkpoint")
    assert fold(inner, tmp_path / "out", "--force") == 2
    assert "holds the input" in capsys.readouterr().err


def test_the_built_in_prompts_are_the_default(made: Made, tmp_path: Path) -> None:
    assert fold(made.path, tmp_path / "out", "--check-error") == 0
    outputs = certificate(tmp_path / "out").outputs
    assert outputs is not None
    assert (outputs.prompts, outputs.prompt_source) == (8, "8 of the built-in prompts")


@pytest.mark.parametrize("options", [(), ("--check-error",)], ids=str)
def test_json_is_one_object_on_standard_output(
    options: tuple[str, ...], made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fold(made.path, tmp_path / "out", "--json", *options) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "out" / "fold_certificate.json").read_text())
    assert f"wrote {tmp_path / 'out'}" in err


def test_the_verdict_is_shown(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fold(made.path, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "fold passed" in out
    assert f"wrote {tmp_path / 'out'}" in out


def test_the_installed_command(made: Made, tmp_path: Path) -> None:
    """It runs in a new process, where nothing has been imported or silenced yet."""
    command = Path(sys.executable).with_name("loraover-export")
    arguments = [str(command), "fold", str(made.path), "-o", str(tmp_path / "out"), "--json", "--check-error"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert FoldCertificate.model_validate_json(done.stdout).passed
    assert "Traceback" not in done.stderr


def test_a_trainer_checkpoint_folds(made: Made, tmp_path: Path) -> None:
    model = lora_model(made.base, target_modules=LINEAR)
    ids = token_ids(batch=8)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, arguments, train_dataset=data, callbacks=[LoraOverCallback()]).train()
    source = tmp_path / "run" / "checkpoint-2"
    before = tree(source)
    assert (source / "optimizer.pt").exists()
    assert fold(source, tmp_path / "out", "--check-error") == 0
    assert tree(source) == before
    assert certificate(tmp_path / "out").step == 2
    assert fold(tmp_path / "run" / "checkpoint-4", tmp_path / "last", "--check-error") == 0
    exact, written = oracle_matrices(tmp_path / "run" / "checkpoint-4"), tensors(tmp_path / "last")
    for key, matrix in exact.items():
        np.testing.assert_array_equal(numpy64(written[key]), nearest(matrix, "fp32"), err_msg=key)
    final = PeftModel.from_pretrained(load_base(made), tmp_path / "last").eval()
    assert float((logits(final) - logits(model.eval())).abs().max()) < 1e-6


def test_each_of_several_adapters_folds_to_itself(made: Made, tmp_path: Path) -> None:
    model = lora_model(made.base)
    with torch.random.fork_rng(devices=[]):
        model.add_adapter("second", LoraConfig(r=2, lora_alpha=3, target_modules=["k_proj", "q_proj"]))
    fill_b(model, seed=4)
    model.base_model.set_adapter(["default", "second"])
    over = OverParameterization(model, LoraOverConfig(seed=5))
    over.attach(optimizer := AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    train(model, optimizer, range(2))
    path = tmp_path / "both"
    save(path, model, over, step=2)
    for adapter, source in (("default", path), ("second", path / "second")):
        assert fold(source, tmp_path / adapter, "--check-error") == 0
        model.base_model.set_adapter(adapter)
        folded = PeftModel.from_pretrained(load_base(made), tmp_path / adapter).eval()
        assert float((logits(folded) - logits(model)).abs().max()) < 1e-6
    model.base_model.set_adapter("default")
    assert float((logits(folded) - logits(model)).abs().max()) > 1e-3
