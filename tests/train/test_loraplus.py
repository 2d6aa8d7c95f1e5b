"""LoRA+: learning rates by parameter."""

from __future__ import annotations

from pathlib import Path

import pytest

import loraover
from loraover.common.errors import ConfigError
from loraover.training.hf_trainer import _optimizer
from loraover.training.recipe import load_recipe

from support.tiny_models import tiny_llama, with_lora

RATE, RATIO = 1e-3, 4.0


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "soap"])
def test_b_has_a_multiple_of_the_rate_and_embeddings_have_the_rate(optim: str, recipe: Path) -> None:
    if optim == "soap":
        pytest.importorskip("pytorch_optimizer", reason="pip install 'loraover[soap]'")
    rates = {"training.learning_rate": RATE, "training.loraplus_lr_ratio": RATIO}
    asked = load_recipe(recipe, {**rates, "training.optim": optim, "method": "lora"})
    model = with_lora(tiny_llama(), target_modules=["embed_tokens", "q_proj"])
    make = _optimizer(asked)
    assert make is not None
    optimizer = make(model)
    of_parameters = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    found = {
        name: of_parameters[id(parameter)] for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    kinds = ("lora_embedding_A", "lora_embedding_B", "lora_A", "lora_B")
    by_kind = {kind: {rate for name, rate in found.items() if f".{kind}." in name} for kind in kinds}
    assert by_kind == {kind: {RATE} for kind in kinds} | {"lora_B": {RATE * RATIO}}


@pytest.mark.parametrize("optim", ["adamw_torch_xla", "adamw_torch_8bit", "sgd"])
def test_another_optimizer_is_refused(optim: str, recipe: Path, tmp_path: Path) -> None:
    changes = {"training.loraplus_lr_ratio": RATIO, "training.optim": optim, "method": "lora"}
    with pytest.raises(ConfigError, match="needs a LoRA and optim adamw_torch, adamw_torch_fused or soap"):
        loraover.train(recipe, tmp_path / "out", overrides=changes)
