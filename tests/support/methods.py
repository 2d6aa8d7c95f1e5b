"""A method beside LoRA-Over just before its first step, and what its tests know of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from peft import PeftModel
from transformers import PreTrainedModel

from loraover.training.launch.settings import with_adapter
from loraover.training.method_table import METHODS
from loraover.training.recipe import load_recipe
from loraover.training.run.trainer import MethodCallback

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
    """The model with an adapter of rank `RANK` and scaling `SCALING`, and the method that has prepared it."""
    lora = {"lora.r": RANK, "lora.lora_alpha": RANK * SCALING}
    recipe = load_recipe("demo", {"method": name, name: settings} | lora | dict(options or {}))
    method = METHODS[name](recipe)
    source: Any = SimpleNamespace(name="base", revision=None)
    model = with_adapter(base, recipe, task, source, method)
    method.freeze(model)
    method.start(model)
    return model, method


Watch = Callable[[Any, Any, bool], None]
"""Called with the method, the optimizer, and whether it has taken the step."""


@contextmanager
def watched_steps(watch: Watch) -> Iterator[None]:
    """Let `watch` see every optimizer step of the block's runs, before and after it."""

    class Watched(MethodCallback):
        def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **kwargs: Any) -> None:
            watch(self.method, optimizer, False)

        def on_optimizer_step(self, *_: Any, optimizer: Any = None, **kwargs: Any) -> None:
            watch(self.method, optimizer, True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraover.training.run.trainer.MethodCallback", Watched)
        yield
