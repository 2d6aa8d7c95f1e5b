"""A fold, read back: each element against oracles and PEFT, rounded once; its certificate, card and verdict."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.optim import AdamW
from transformers import Trainer, TrainingArguments

from loraover import LoraOverConfig, OverParameterization
from loraover.callbacks.loraover_callback import LoraOverCallback
from loraover.checkpoint.peft_adapter import site_key
from loraover.overparam.decompositions import DECOMPOSITIONS
from loraover_export.fold.report import FoldCertificate, verdict_of

from oracles.contraction import Array
from support.fold_cases import ADAPTER, DTYPES, FILES, HALF, LORA, Q_A, certificate, load_base, tensors
from support.make_checkpoint import (
    EMBEDDING,
    LINEAR,
    Made,
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
from support.plugin import make_checkpoint_on
from support.refusals import Refused, fold
from support.reports import fold_certificate
from support.tiny_hub import save_llama
from support.tiny_models import fill_b, token_ids

pytestmark = pytest.mark.process


@dataclass(frozen=True)
class Folded:
    """A checkpoint and what `fold --check-error` wrote of it."""

    made: Made
    out: Path


@pytest.fixture(
    scope="module",
    params=[*((lora, "mpo") for lora in LORA), *(("plain", name) for name in DECOMPOSITIONS if name != "mpo")],
    ids=", ".join,
)
def folded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folded:
    """Of each kind of LoRA by MPOs, and of a plain one by each decomposition."""
    lora, decomposition = request.param
    folder = tmp_path_factory.mktemp("folded")
    made = make_checkpoint(folder, config=LoraOverConfig(decomposition=decomposition, seed=5), **LORA[lora])
    before = tree(made.path) | tree(made.base)
    assert fold(made.path, folder / "out", "--check-error") == 0
    assert tree(made.path) | tree(made.base) == before
    return Folded(made, folder / "out")


def test_every_site_is_the_oracles_contraction(folded: Folded) -> None:
    exact, written, stored = oracle_matrices(folded.made.path), tensors(folded.out), tensors(folded.made.path)
    assert {path.name for path in folded.out.iterdir()} == FILES | {"figures"}
    assert written.keys() == stored.keys() >= exact.keys()
    assert len(exact) == len(folded.made.over.sites)
    for key, matrix in exact.items():
        error = float(np.linalg.norm(numpy64(written[key]) - matrix) / np.linalg.norm(matrix))
        assert error <= 1e-6, key
        assert written[key].dtype == torch.float32
        assert float(np.linalg.norm(matrix)) > 1e-3, key
    assert all(torch.equal(written[key], stored[key]) for key in written.keys() - exact.keys())


def test_peft_loads_the_fold_with_the_training_models_logits(folded: Folded) -> None:
    model, made = PeftModel.from_pretrained(load_base(folded.made), folded.out).eval(), folded.made
    # training rounds its contraction to fp32 in another order: a few 2^-24 in logits below 1
    assert float((logits(model) - made.logits()).abs().max()) < 1e-6
    with model.disable_adapter():
        assert float((logits(model) - made.logits()).abs().max()) > 1e-3


def test_the_configuration_is_that_of_the_checkpoint(folded: Folded) -> None:
    expected, found = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (folded.made.path, folded.out)
    )
    assert found == {**expected, "inference_mode": True}
    for name in ADAPTER:
        assert b"loraover" not in (folded.out / name).read_bytes().lower()


def test_the_outputs_are_within_their_bound(folded: Folded) -> None:
    outputs = certificate(folded.out).outputs
    assert outputs is not None
    assert outputs.error.max_logit <= outputs.bound == certificate(folded.out).output_bound
    assert outputs.adapter_effect > 5 * outputs.bound
    assert outputs.tokens == 8 * 32
    assert "no tokenizer" in outputs.prompt_source


@pytest.mark.parametrize(
    ("decomposition", "dtype"), [*((name, "bf16") for name in DECOMPOSITIONS), ("mpo", "fp32"), ("mpo", "fp16")]
)
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


# Rounding


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


# What a fold prints and leaves beside its adapter


def test_json_is_one_object_on_standard_output(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fold(made.path, tmp_path / "out", "--json", "--check-error") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "out" / "fold_certificate.json").read_text())
    assert f"wrote {tmp_path / 'out'}" in err


def test_the_verdict_is_shown_and_the_card_has_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_checkpoint(tmp_path)
    (made.base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert fold(made.path, tmp_path / "out", "--dtype", "bf16") == 0
    out = capsys.readouterr().out
    assert "fold passed" in out
    assert f"wrote {tmp_path / 'out'}" in out
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'license: "apache-2.0"' in card
    assert f'base_model: "{made.base}"' in card
    assert f"loraover export fold {made.path} -o {tmp_path / 'out'} --dtype bf16" in card
    assert "8 of 8 within their bounds" in card


# The sentence at the head of the report


WITHIN = "All 60 matrices are rounded to nearest, within the bound by construction."
LOGITS = "Logits differ by at most 1.2e-5, where rounding explains 3e-5."


@pytest.mark.parametrize(
    ("certificate", "tone", "expected"),
    [
        (
            fold_certificate(),
            "good",
            f"The folded adapter computes what was trained. {WITHIN} {LOGITS} The adapter itself moves them by up to "
            "2.1.",
        ),
        (
            fold_certificate(error=None),
            "good",
            f"A and B are what was trained. {WITHIN} Outputs were not compared; --check-error does that.",
        ),
        (
            fold_certificate("inconclusive", effect=0.0),
            "open",
            f"The fold is right as far as this check can see. {WITHIN} {LOGITS} But the adapter moves no logit at all. "
            "An adapter that does nothing would pass as well.",
        ),
    ],
)
def test_each_verdict_has_its_figures(certificate: FoldCertificate, tone: str, expected: str) -> None:
    verdict = verdict_of(certificate)
    assert (verdict.tone, verdict.word, verdict.sentence) == (tone, certificate.verdict, expected)


# The base that it was trained on


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_fold_tells_how_far_the_served_base_is_from_the_trained_one(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    wide = save_llama(tmp_path / "base", hidden_size=128, intermediate_size=256)  # on a CPU, nf4 needs 64 columns
    make_checkpoint_on(wide, checkpoint := tmp_path / "checkpoint")
    assert fold(checkpoint, tmp_path / "out", "--check-error", "--trained-on", kind) == 0
    found = certificate(tmp_path / "out").trained_base
    assert found is not None
    assert found.quantization == kind
    outputs = certificate(tmp_path / "out").outputs
    assert outputs is not None
    assert 10 * outputs.error.max_logit < found.difference.max_logit < 10 * outputs.adapter_effect
    assert found.bases.max_logit > 0
    for text in (capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()):
        assert f"it was trained on that model in {kind}" in text
    assert f"trained on that model in {kind}" in (tmp_path / "out" / "fold.html").read_text()


def test_the_trained_base_is_part_of_the_check_of_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_checkpoint(tmp_path)
    assert fold(made.path, tmp_path / "out", "--trained-on", "nf4") == 2
    assert "--trained-on needs --check-error" in capsys.readouterr().err
