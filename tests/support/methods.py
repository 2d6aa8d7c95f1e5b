"""A method beside LoRA-Over just before its first step, and what its tests know of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback

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


Watch = Callable[[Any, Any, bool], None]
"""Called with the method, the optimizer, and whether it has taken the step."""


@contextmanager
def watched_steps(name: str, watch: Watch) -> Iterator[None]:
    """Let `watch` see every optimizer step of the block's runs, before and after it."""
    callbacks = METHODS[name].callbacks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(METHODS[name], "callbacks", lambda self: [*callbacks(self), _Watcher(self, watch)])
        yield


class _Watcher(TrainerCallback):
    def __init__(self, method: Any, watch: Watch) -> None:
        self.method, self.watch = method, watch

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.watch(self.method, optimizer, False)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.watch(self.method, optimizer, True)
