"""Trainers of TRL and transformers that a recipe can name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, NamedTuple

from loraover.common.errors import ConfigError
from loraover.training.recipe import Recipe


class TrainerKind(NamedTuple):
    """A trainer of TRL or transformers.

    Args:
        library: Module that has the two classes.
        trainer: Name of the trainer's class.
        config: Name of the class of its settings.
        task: PEFT's task type.
        columns: Columns of its rows; one set of them has to be there.
        options: Settings that the run gives unless the recipe does.
    """

    library: str
    trainer: str
    config: str
    task: str
    columns: tuple[frozenset[str], ...]
    options: Mapping[str, Any] = {}

    @property
    def texts(self) -> int:
        """Number of texts of an example that pass the model at once."""
        return 2 if any("chosen" in columns for columns in self.columns) else 1

    def load(self) -> tuple[Any, Any]:
        """Import the classes of the trainer and of its settings."""
        module = importlib.import_module(self.library)
        try:
            return getattr(module, self.trainer), getattr(module, self.config)
        except (AttributeError, ImportError) as error:
            name = self.trainer.removesuffix("Trainer").lower()
            apart = f"{self.library}.experimental.{name}"
            if importlib.util.find_spec(f"{self.library}.experimental") and importlib.util.find_spec(apart):
                why = f"has it only in {apart}, whose interface may change with any version"
            else:
                why = f"has none: {error}"
            raise ConfigError(f"trainer {name}: {self.library} {module.__version__} {why}; use dpo or kto.") from error


def _columns(*choices: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(choice.split()) for choice in choices)


def _trl(name: str, *columns: str, task: str = "CAUSAL_LM", **options: Any) -> TrainerKind:
    return TrainerKind("trl", f"{name}Trainer", f"{name}Config", task, _columns(*columns), options)


TRAINERS = {
    "sft": _trl("SFT", "prompt completion", "messages", "text", eval_packing=False),
    "dpo": _trl("DPO", "chosen rejected"),
    "kto": _trl("KTO", "prompt completion label"),
    "orpo": _trl("ORPO", "chosen rejected"),
    "grpo": _trl("GRPO", "prompt"),
    "reward": _trl("Reward", "chosen rejected margin", "chosen rejected", task="SEQ_CLS"),
    "seq2seq": TrainerKind(
        "transformers", "Seq2SeqTrainer", "Seq2SeqTrainingArguments", "SEQ_2_SEQ_LM", _columns("prompt completion")
    ),
    "classification": TrainerKind("transformers", "Trainer", "TrainingArguments", "SEQ_CLS", _columns("text label")),
}
"""Trainers by the name that a recipe gives them."""


def trainer_name(recipe: Recipe, *, is_seq2seq: bool) -> str:
    """Return the name of a recipe's trainer."""
    name = recipe.trainer or ("seq2seq" if is_seq2seq else "sft")
    if is_seq2seq != (TRAINERS[name].task == "SEQ_2_SEQ_LM"):
        kind = "has an encoder and a decoder; its trainer is seq2seq" if is_seq2seq else "is decoder-only; use sft"
        raise ConfigError(f"trainer is {name}, and {recipe.model} {kind}.")
    return name


def find_reward(name: str) -> Any:
    """Return a reward of `trl.rewards`, or the function that a dotted name such as "module.function" imports."""
    import trl.rewards

    module, _, function = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module) if module else trl.rewards, function)
        if not callable(found):
            raise TypeError(f"it is {found!r:.80}")
        return found
    except (ImportError, AttributeError, TypeError) as error:
        known = ", ".join(one for one in trl.rewards.__all__ if one.endswith("reward"))
        raise ConfigError(
            f"reward_funcs: {name!r} is neither of trl.rewards ({known}) nor a function: {error}"
        ) from error
