"""Full fine-tuning: all weights are trained, and no adapter."""

from __future__ import annotations

from typing import final

from loraover.training.methods.base import TrainingMethod
from loraover.training.recipe_parts import BaseRecipe


@final
class Full(TrainingMethod):
    """Training of all weights."""

    @classmethod
    def check_recipe(cls, recipe: BaseRecipe) -> None:
        if recipe.lora.start_from is not None:
            raise ValueError("method full trains no adapter, so nothing can start from one; leave out lora.start_from")
        if recipe.model_init.quantization is not None:
            raise ValueError("method full cannot train quantised weights; leave out model_init.quantization")
