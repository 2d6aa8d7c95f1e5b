"""LoRA-Over, whose cores the trainer's callback steps."""

from __future__ import annotations

from typing import final

from loraover.checkpoint.adapter_config import KEPT_BASE
from loraover.training.methods.base import TrainingMethod
from loraover.training.recipe_parts import BaseRecipe


@final
class LoraOver(TrainingMethod):
    """Training of cores, whose fold is a plain LoRA."""

    @classmethod
    def check_recipe(cls, recipe: BaseRecipe) -> None:
        start = recipe.lora.init_lora_weights
        if isinstance(start, str) and start.lower() not in KEPT_BASE:
            raise ValueError(
                f"lora.init_lora_weights {start!r} changes the base weights, so no fold would be a plain LoRA; use "
                "true, gaussian or orthogonal, or train with method lora"
            )
        if recipe.lora.use_dora:
            raise ValueError(
                "lora.use_dora: DoRA is more than a product B A, so no fold would be a plain LoRA; "
                "train with method lora"
            )
