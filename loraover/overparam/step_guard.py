"""What happens when `optimizer.step` raises, for which PyTorch has no hook."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

from torch.optim import Optimizer


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
