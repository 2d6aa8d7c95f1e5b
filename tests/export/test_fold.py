"""What a fold writes, read back: against the oracles, and against PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.optim import AdamW
from transformers import Trainer, TrainingArguments

from loraover import LoraOverConfig, OverParameterization
from loraover.callbacks.loraover_callback import LoraOverCallback
from loraover.overparam.decompositions import DECOMPOSITIONS

from support.fold_cases import ADAPTER, FILES, LORA, Q_B, certificate, load_base, tensors
from support.make_checkpoint import (
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
from support.refusals import fold
from support.tiny_models import fill_b, token_ids

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An MPO checkpoint in fp32 on q_proj and v_proj; tests read it only."""
    return make_checkpoint(tmp_path_factory.mktemp("made"), tokenizer=True)


@pytest.mark.parametrize(
    ("lora", "decomposition"),
    [*((lora, "mpo") for lora in LORA), *(("plain", name) for name in DECOMPOSITIONS if name != "mpo")],
)
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
