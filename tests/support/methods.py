"""A method beside LoRA-Over just before its first step, and what its tests know of the model."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from loraover.training.adapter import with_adapter
from loraover.training.methods import METHODS
from loraover.training.recipe import load_recipe

RANK, SCALING = 4, 2.0
PREFIX = "base_model.model."
"""What PEFT puts before the names of the base model's modules."""


def started(
    name: str,
    base: PreTrainedModel,
    *,
    task: str = "CAUSAL_LM",
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> tuple[PeftModel, Any]:
    """The model with an adapter of rank `RANK` and scaling `SCALING`, and the method that has prepared it.

    Args:
        name: the method, as in a recipe.
        base: the base model.
        task: its task, as PEFT names it.
        options: other keys of the recipe.
        settings: settings of the method.
    """
    lora = {"lora.r": RANK, "lora.lora_alpha": RANK * SCALING}
    recipe = load_recipe("demo", {"method": name, name: settings} | lora | dict(options or {}))
    method = METHODS[name](recipe)
    source: Any = SimpleNamespace(name="base", revision=None)
    model = with_adapter(base, recipe, task, source, method)
    method.start(model)
    return model, method
