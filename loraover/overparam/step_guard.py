"""Guards of an optimizer where PyTorch has no hook: when `step` raises, and when the optimizer is copied."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

from torch.optim import Optimizer

from loraover.common.errors import ConfigError


class StepGuard:
    """A function that is called whenever `optimizer.step` raises, until `remove`.

    Learning-rate schedulers and Accelerate wrap `step`, too, before or after; the guard keeps what they find in it.

    Args:
        optimizer: Optimizer whose attribute `step` is wrapped.
        undo: Function to call before the exception goes on.
    """

    def __init__(self, optimizer: Optimizer, undo: Callable[[], None]) -> None:
        self._optimizer = optimizer
        self._undo: Callable[[], None] | None = undo
        self._before = vars(optimizer).get("step")
        step: Any = optimizer.step

        @wraps(getattr(step, "__func__", step))
        def guarded(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            try:
                return step(*args, **kwargs)
            except BaseException:
                if self._undo is not None:
                    self._undo()
                raise

        self._guarded = MethodType(guarded, optimizer)  # whose `__func__` schedulers wrap
        vars(optimizer)["step"] = self._guarded

    def remove(self) -> None:
        """Take the wrapper away, or leave it without an effect if another one is around it."""
        self._undo = None
        if vars(self._optimizer).get("step") is not self._guarded:
            return
        if self._before is None:
            del vars(self._optimizer)["step"]
        else:
            vars(self._optimizer)["step"] = self._before


class CopyGuard:
    """A refusal of `copy` and `pickle` of an optimizer, until `remove`: its copy would have no hooks.

    Args:
        optimizer: Optimizer whose hooks train cores.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._attributes = vars(optimizer)

        def refuse(_: object) -> Any:
            raise ConfigError(
                f"{type(optimizer).__name__} trains cores, and a copy of it would train the LoRA matrices without "
                "them. Copy or save its state_dict(), or copy the optimizer before attach."
            )

        self._attributes["__reduce_ex__"] = refuse

    def remove(self) -> None:
        """Let the optimizer be copied again."""
        self._attributes.pop("__reduce_ex__", None)
