"""Methods beside plain LoRA and LoRA-Over, which end as plain LoRAs on the original base model.

A new method is one file with a class, one line here, its settings in `loraover.training.method_settings`, and its name
in `Recipe` and in the option `--method`.
"""

from __future__ import annotations

from loraover.common.errors import ConfigError
from loraover.training.methods.base import Method
from loraover.training.methods.federated import Federated
from loraover.training.methods.lorasc import LoraSc
from loraover.training.methods.soma import Soma
from loraover.training.methods.tensorguide import TensorGuide
from loraover.training.recipe import Recipe

METHODS: dict[str, type[Method]] = {
    "soma": Soma,
    "lorasc": LoraSc,
    "federated": Federated,
    "tensorguide": TensorGuide,
}
"""Classes of the methods, by the recipe's `method`."""


def make_method(recipe: Recipe, *, is_seq2seq: bool) -> Method | None:
    """Return the method of a recipe; None for plain LoRA, LoRA-Over and full fine-tuning.

    Args:
        recipe: The recipe.
        is_seq2seq: Whether its base model is an encoder-decoder.

    Raises:
        ConfigError: the method does not train encoder-decoders, or needs a package that is not installed.
    """
    kind = METHODS.get(recipe.method)
    if kind is None:
        return None
    if is_seq2seq and not kind.trains_seq2seq:
        trained = ", ".join(name for name, method in METHODS.items() if method.trains_seq2seq)
        raise ConfigError(
            f"method is {recipe.method}, which trains causal models only, and {recipe.model} is an encoder-decoder. "
            f"Use lora, lora-over or {trained}."
        )
    return kind(recipe)
