"""LoRA+: learning rates by parameter."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainingArguments

import loraover
from loraover.training.recipe import load_recipe
from loraover.training.run.trainer import own_optimizer

from support.tiny_models import tiny_llama, with_lora
from support.trained_run import watched

RATE, RATIO = 1e-3, 4.0


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "soap"])
def test_b_has_a_multiple_of_the_rate_and_embeddings_have_the_rate(optim: str, recipe: Path) -> None:
    if optim == "soap":
        pytest.importorskip("pytorch_optimizer", reason="the extra soap is not installed")
    rates = {"training.learning_rate": RATE, "training.loraplus_lr_ratio": RATIO}
    asked = load_recipe(recipe, {**rates, "training.optim": optim, "method": "lora"})
    model = with_lora(tiny_llama(), target_modules=["embed_tokens", "q_proj"])
    make = own_optimizer(asked, TrainingArguments())
    assert make is not None
    optimizer = make(model)
    of_parameters = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    found = {
        name: of_parameters[id(parameter)] for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    kinds = ("lora_embedding_A", "lora_embedding_B", "lora_A", "lora_B")
    by_kind = {kind: {rate for name, rate in found.items() if f".{kind}." in name} for kind in kinds}
    assert by_kind == {kind: {RATE} for kind in kinds} | {"lora_B": {RATE * RATIO}}


@pytest.mark.parametrize("method", ["lora", "tensorguide"])
def test_an_optimizer_that_a_run_makes_has_the_betas_of_its_recipe(method: str, recipe: Path, tmp_path: Path) -> None:
    options = {"adam_beta1": 0.7, "adam_beta2": "0.8", "adam_epsilon": 1e-3, "max_steps": 1, "optim": "adamw_torch"}
    changes = {"method": method} | {f"training.{key}": value for key, value in options.items()}
    changes |= {"training.loraplus_lr_ratio": RATIO} if method == "lora" else {"tensorguide.tt_rank": 2}
    with watched() as seen:
        loraover.train(recipe, tmp_path / "out", overrides=changes)
    ((trainer, _),) = seen
    assert {(group["betas"], group["eps"]) for group in trainer.optimizer.param_groups} == {((0.7, 0.8), 1e-3)}
