"""Methods of training, all of which except full fine-tuning end as plain LoRAs on the original base model.

LoRA, LoRA-Over and full fine-tuning are here. Other methods are found by entry points of the group `loraover.methods`,
each of which names the class of a method's settings; their attribute `method` is the class that trains it.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, final

from pydantic import Field, create_model

from loraover.checkpoint.adapter_config import KEPT_BASE
from loraover.common.errors import ConfigError
from loraover.training.method import TrainingMethod
from loraover.training.recipe_parts import BaseRecipe

GROUP = "loraover.methods"


@final
class Full(TrainingMethod):
    """Training of all weights, and no adapter."""

    @classmethod
    def check_recipe(cls, recipe: BaseRecipe) -> None:
        if recipe.lora.start_from is not None:
            raise ValueError("method full trains no adapter, so nothing can start from one; leave out lora.start_from")
        if recipe.model_init.quantization is not None:
            raise ValueError("method full cannot train quantised weights; leave out model_init.quantization")


@final
class LoraOver(TrainingMethod):
    """Training of cores, which the trainer's callback steps, and whose fold is a plain LoRA."""

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


BUILT_IN: dict[str, type[TrainingMethod]] = {"lora-over": LoraOver, "full": Full}
"""Classes of the methods without settings; plain LoRA needs none."""


def find_settings() -> tuple[dict[str, Any], list[str]]:
    """Find the classes of the settings of other methods by name, and the names of those whose package is missing."""
    found, missing = {}, []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            found[point.name] = point.load()
        except ModuleNotFoundError as error:
            if error.name != point.module.partition(".")[0]:
                raise
            missing.append(point.name)
    return found, missing


SETTINGS, MISSING = find_settings()
"""Settings of the methods that entry points name, and the names of methods that are not installed."""

METHODS: dict[str, type[TrainingMethod]] = {name: settings.method for name, settings in SETTINGS.items()}
"""Classes of the methods that entry points name, by the recipe's `method`."""

if TYPE_CHECKING:
    MethodKeys = BaseRecipe
else:
    MethodKeys = create_model(
        "MethodKeys",
        __base__=BaseRecipe,
        __doc__="Keys of a recipe with the settings of one method each, by its name.",
        **{
            name: (settings, Field(settings(), description=f"Settings of method {name}."))
            for name, settings in SETTINGS.items()
        },
    )


def make_method(recipe: BaseRecipe, *, is_seq2seq: bool) -> TrainingMethod:
    """Return the method of a recipe; `TrainingMethod` itself for plain LoRA, LoRA-Over and full fine-tuning."""
    kind = METHODS.get(recipe.method, TrainingMethod)
    if is_seq2seq and not kind.trains_seq2seq:
        trained = ", ".join(name for name, method in METHODS.items() if method.trains_seq2seq)
        raise ConfigError(
            f"method is {recipe.method}, which trains causal models only, and {recipe.model} is an encoder-decoder. "
            f"Use one of lora, lora-over, {trained}."
        )
    return kind(recipe)
