"""Methods of training, which but for full fine-tuning end as plain LoRAs on the original base model.

A new method is one file, whose settings name the class that trains it, and one line here.
"""

from __future__ import annotations

from pydantic import Field

from loraover.common.errors import ConfigError
from loraover.training.methods.base import TrainingMethod
from loraover.training.methods.federated import FederatedSettings
from loraover.training.methods.full import Full
from loraover.training.methods.lora_over import LoraOver
from loraover.training.methods.lorasc import LoraScSettings
from loraover.training.methods.soma import SomaSettings
from loraover.training.methods.tensorguide import TensorGuideSettings
from loraover.training.recipe_parts import BaseRecipe


class MethodKeys(BaseRecipe):
    """Keys of a recipe with the settings of one method each, by its name."""

    soma: SomaSettings = Field(SomaSettings(), description="Settings of method soma.")
    lorasc: LoraScSettings = Field(LoraScSettings(), description="Settings of method lorasc.")
    federated: FederatedSettings = Field(FederatedSettings(), description="Settings of method federated.")
    tensorguide: TensorGuideSettings = Field(TensorGuideSettings(), description="Settings of method tensorguide.")


METHODS: dict[str, type[TrainingMethod]] = {
    name: field.default.method for name, field in MethodKeys.model_fields.items() if name not in BaseRecipe.model_fields
}
"""Classes of the methods of other papers, by the recipe's `method`."""

BUILT_IN: dict[str, type[TrainingMethod]] = {"lora-over": LoraOver, "full": Full}
"""Classes of the methods without settings; plain LoRA needs none."""


def make_method(recipe: BaseRecipe, *, is_seq2seq: bool) -> TrainingMethod:
    """Return the method of a recipe; `TrainingMethod` itself for plain LoRA, LoRA-Over and full fine-tuning.

    Args:
        recipe: The recipe.
        is_seq2seq: Whether its base model is an encoder-decoder.

    Raises:
        ConfigError: The method does not train encoder-decoders, or needs a package that is not installed.
    """
    kind = METHODS.get(recipe.method, TrainingMethod)
    if is_seq2seq and not kind.trains_seq2seq:
        trained = ", ".join(name for name, method in METHODS.items() if method.trains_seq2seq)
        raise ConfigError(
            f"method is {recipe.method}, which trains causal models only, and {recipe.model} is an encoder-decoder. "
            f"Use one of lora, lora-over, {trained}."
        )
    return kind(recipe)
