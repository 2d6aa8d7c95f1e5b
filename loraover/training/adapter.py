"""The LoRA of a recipe on its base model."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from loraover.checkpoint.adapter_config import PATTERN_ERRORS
from loraover.common.errors import ConfigError
from loraover.models.load import ModelSource
from loraover.training.method import TrainingMethod
from loraover.training.recipe import Recipe
from loraover.training.trainers import build, lora_options


def with_adapter(
    base: PreTrainedModel, recipe: Recipe, task: str, source: ModelSource, method: TrainingMethod | None = None
) -> PeftModel:
    """Wrap the base model with the recipe's LoRA, untrained.

    Args:
        base: The base model; it is changed.
        recipe: The recipe, whose `lora` decides.
        task: PEFT's task type.
        source: Where the base model comes from.
        method: The recipe's method, if it is one that asks for further options.

    Raises:
        ConfigError: PEFT refuses the recipe's `lora`, or the method's settings do not fit the model.
    """
    base.name_or_path = source.name
    options = lora_options(recipe) | ({} if method is None else method.lora_options(base))
    config = build(LoraConfig, "lora", {"task_type": task, "revision": source.revision, **options})
    try:
        model = get_peft_model(base, config)
    except PATTERN_ERRORS as error:
        raise ConfigError(f"lora: a pattern is not a regular expression, which PEFT expects: {error}") from error
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"lora: PEFT refuses it: {error}") from error
    adapted = [f".{name}" for name in model.base_model.targeted_parameter_names]
    for entry in recipe.lora.target_parameters or ():  # of an entry without effect, PEFT warns only
        if not any(name.endswith(f".{entry}") for name in adapted):
            raise ConfigError(
                f"lora.target_parameters: {entry!r} names no parameter of {source.name}; give the end of a "
                "name, such as mlp.experts.down_proj."
            )
    return model
