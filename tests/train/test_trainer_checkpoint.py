"""Checkpoints of the Trainer for models that are no PeftModel, and in the trials of a hyperparameter search."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import nn
from transformers import Trainer

from loraover import LoraOverCallback, SealCheckpoints, last_whole_checkpoint, read_checkpoint

from support.hf_trainer import DATA, arguments, assert_contracted, assert_holds, llama, trainer_of
from support.tiny_models import fill_b, lora_matrices, tiny_llama, token_ids

pytestmark = pytest.mark.process


class Around(nn.Module):
    """A user's module around a language model."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(1, 1)

    def forward(self, input_ids: Any, labels: Any = None) -> Any:
        return self.inner(input_ids=input_ids, labels=labels)


def injected(adapter: str) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = inject_adapter_in_model(config, tiny_llama(), adapter)
    fill_b(model)
    return model


MODELS: dict[str, Callable[[str], nn.Module]] = {
    "a module around a PeftModel": lambda adapter: Around(llama(adapter=adapter, target_modules=["q_proj", "up_proj"])),
    "a tuner alone": lambda adapter: llama(adapter=adapter, target_modules=["q_proj", "up_proj"]).base_model,
    "an injected adapter": injected,
    "a module around an injected adapter": lambda adapter: Around(injected(adapter)),
}

NAMED: Any = {"remove_unused_columns": False, "label_names": ["labels"]}
"""Names that the Trainer cannot take from the signature of each of these models."""


@pytest.mark.parametrize(("kind", "adapter"), [*((kind, "default") for kind in MODELS), ("a tuner alone", "math")])
def test_a_model_that_is_no_peft_model_is_saved_and_resumed(kind: str, adapter: str, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, **NAMED}
    part = "" if adapter == "default" else adapter
    trainer_of(tmp_path, model := MODELS[kind](adapter), **saving).train()
    for folder in (tmp_path / "checkpoint-4", tmp_path):
        assert_contracted(folder / part, sites=8)
    served = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / part))
    assert torch.equal(served(token_ids()).logits, getattr(model, "inner", model).eval()(token_ids()).logits)

    shutil.rmtree(tmp_path / "checkpoint-4")
    trainer = trainer_of(tmp_path, resumed := MODELS[kind](adapter), **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(matrix, lora_matrices(model)[key]) for key, matrix in lora_matrices(resumed).items())


@pytest.mark.parametrize("kind", ["a module around a PeftModel", "an injected adapter"])
def test_the_best_of_a_model_that_is_no_peft_model_is_kept(kind: str, tmp_path: Path) -> None:
    """The highest loss counts as the best, which is that of an early checkpoint."""
    each = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    args = arguments(tmp_path, load_best_model_at_end=True, greater_is_better=True, **each, **NAMED)
    model = MODELS[kind]("default")
    trainer = Trainer(model, args, train_dataset=DATA, eval_dataset=DATA[:4], callbacks=[LoraOverCallback()])
    trainer.train()
    assert trainer.state.best_global_step < 4
    best = read_checkpoint(trainer.state.best_model_checkpoint)
    assert_contracted(tmp_path, sites=8)
    for folder in (tmp_path, best.path):
        served = PeftModel.from_pretrained(tiny_llama(), str(folder))
        assert torch.equal(served(token_ids()).logits, getattr(model, "inner", model).eval()(token_ids()).logits)


@pytest.mark.parametrize("name", [None, lambda trial: f"rate/{trial['learning_rate']}"], ids=["run-id", "hp_name"])
def test_each_trial_of_a_search_has_its_own_checkpoints(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials as `hyperparameter_search` runs them, with the backend whose trials are dictionaries."""
    from transformers.trainer_utils import HPSearchBackend

    args = arguments(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2)
    callbacks = [LoraOverCallback(), SealCheckpoints()]
    models: list[Any] = []

    def make() -> Any:
        models.append(llama())
        return models[-1]

    trainer = Trainer(args=args, model_init=make, train_dataset=DATA, callbacks=callbacks)
    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.WANDB, name
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial)
    for run, rate in (("a", 1e-2), ("b", 1e-3)):
        monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=SimpleNamespace(id=run)))
        trainer.train(trial={"learning_rate": rate})
        folder = tmp_path / (f"run-{run}" if name is None else f"rate/{rate}")
        assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
        assert last_whole_checkpoint(folder) == folder / "checkpoint-4"
        for made in (folder, folder / "checkpoint-4"):
            assert_contracted(made, sites=28)
            assert_holds(models[-1], made)
        for path in folder.rglob("trainer_state.json"):  # the next trial's checkpoints seem to be older
            os.utime(path, (2e9, 2e9))
    assert not (tmp_path / "loraover.json").exists()
