"""A Trainer resumes with the cores of its checkpoint, and ends with those of its best model."""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from loraover import Budget, LoraOverCallback, LoraOverConfig, read_checkpoint
from loraover.common.errors import CheckpointError
from loraover.reporting.schedule import placed

from support.hf_trainer import DATA, arguments, assert_contracted, assert_holds, llama, trainer_of
from support.tiny_models import (
    lora_matrices,
    trainable,
)

pytestmark = pytest.mark.process


# Resuming


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model with A and B cast as TRL casts those on a quantised base."""
    for parameter in trainable(model):
        parameter.data = parameter.data.to(dtype)
    return model


def run(
    folder: Path,
    *,
    resume: str | bool | None = None,
    adapter: str = "default",
    **callback: Any,
) -> Any:
    """Losses of every micro-batch, and the matrices at the end, of a run of 6 steps."""
    model, losses = llama(lora_dropout=0.1, adapter=adapter), []
    model.register_forward_hook(lambda module, args, output: losses.append(output.loss.item()))
    trainer = trainer_of(
        folder,
        model,
        LoraOverCallback(**callback),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=3,
        max_grad_norm=0.5,
    )
    trainer.train(resume_from_checkpoint=resume)
    return losses, lora_matrices(model)


def test_an_adapter_of_another_name_is_resumed(tmp_path: Path) -> None:
    config = LoraOverConfig(schedule="dynamic", budget=Budget(sites=8), rounds=2, start=0.2, end=0.7)
    losses, matrices = run(tmp_path, adapter="math", config=config)
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed_losses, resumed = run(tmp_path, resume=True, adapter="math", config=config)
    assert len(losses) == 12
    assert resumed_losses == losses[6:]
    assert [key for key in matrices if not torch.equal(matrices[key], resumed[key])] == []
    meta = read_checkpoint(tmp_path / "checkpoint-6" / "math").meta
    assert [len(found.chosen) for found in meta.rounds] == [4, 4]
    assert list(placed(meta).values()).count(None) == 20


def test_a_checkpoint_that_was_moved_is_named(tmp_path: Path) -> None:
    losses, matrices = run(tmp_path / "first")
    moved = shutil.copytree(tmp_path / "first" / "checkpoint-3", tmp_path / "kept" / "best")
    with pytest.raises(CheckpointError, match="LoraOverCallback"):
        run(tmp_path / "second", resume=str(moved))
    resumed_losses, resumed = run(tmp_path / "third", resume=str(moved), resume_from=moved)
    assert resumed_losses == losses[6:]
    assert all(torch.equal(matrices[key], resumed[key]) for key in matrices)


# The best model


SCHEDULES = {
    "all": (LoraOverConfig(), 28, 28),
    "dynamic": (LoraOverConfig(schedule="dynamic", budget=Budget(sites=8), rounds=2, start=0.25, end=0.75), 4, 8),
    "measured": (LoraOverConfig(decomposition="eigen", options={"block": 8}), 28, 28),
}
"""A configuration, and how many sites have cores in the best checkpoint, the first, and in the last."""


@pytest.mark.parametrize(
    ("schedule", "adapter", "dtype"),
    [("all", "default", torch.float32), ("dynamic", "math", torch.bfloat16), ("measured", "default", torch.bfloat16)],
    ids=str,
)
def test_the_best_models_weights_are_kept_at_the_end_with_their_cores(
    schedule: str, adapter: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    config, first, last = SCHEDULES[schedule]
    worse, part = count(), "" if adapter == "default" else adapter
    model, callback = in_dtype(llama(adapter=adapter), dtype), LoraOverCallback(config)
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=True,
            optim="adafactor" if schedule == "measured" else "adamw_torch",
        ),
        train_dataset=DATA,
        eval_dataset=DATA[:4],
        compute_metrics=lambda _: {"score": -next(worse)},
        callbacks=[callback],
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert_holds(model, tmp_path / "checkpoint-1" / part)
    for step, sites in ((1, first), (4, last)):
        assert_contracted(tmp_path / f"checkpoint-{step}" / part, sites=sites)
    with pytest.raises(AssertionError):
        assert_holds(model, tmp_path / "checkpoint-4" / part)
    assert_holds(model, tmp_path / part)
    assert_contracted(tmp_path / part, sites=first)
    assert read_checkpoint(tmp_path / part).meta.step == 1
    model.save_pretrained(tmp_path / "best")
    callback.save(tmp_path / "best", step=4)
    best = read_checkpoint(tmp_path / "best" / part)
    assert_contracted(best.path, sites=first)
    assert_holds(model, best.path)
    assert best.meta.rounds == read_checkpoint(tmp_path / "checkpoint-1" / part).meta.rounds
