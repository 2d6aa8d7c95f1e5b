"""PyTorch's optimizers: which of them can train cores, what their state means, and guards of their step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import wraps
from types import FrameType, MethodType
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from torch.optim import Adagrad, Optimizer

from loraover.common.errors import ConfigError

REFUSED_OPTIMIZERS = {
    "LBFGS": "it keeps its own list of parameters, so it would never step the cores",
    "LayerWiseDummyOptimizer": "it steps inside the backward pass, before gradients can be pulled back",
    "Lomo": "it steps inside the backward pass, before gradients can be pulled back",
    "AdaLomo": "it steps inside the backward pass, before gradients can be pulled back",
    "SOAP": "it keeps state in lists, which a checkpoint cannot hold; use decomposition eigen with AdamW instead",
}

ELEMENTWISE = (
    torch.optim.Adadelta,
    Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)
"""Optimizers that update each number from its own history alone, so that a stack of cores can be one parameter."""

ROTATED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, Adagrad)
"""Optimizers whose state can be turned together with a basis: means of gradients, and of their squares."""

PLAIN = (bool, int, float, str, type(None))
"""Types of values, besides tensors, in an optimizer's state that a checkpoint can hold."""

BLIND = (torch.optim.SGD, torch.optim.Muon) if Version(torch.__version__) >= Version("2.9") else (torch.optim.SGD,)
"""Optimizers whose step turns with the basis, so that no basis changes what they learn."""

LINEAR = {"exp_avg", "momentum_buffer", "grad_avg"}
"""Keys of an optimizer's state under which it keeps means of gradients."""

SQUARED = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}
"""Keys under which an optimizer keeps means, or sums, of squared gradients."""

TRANSPARENT = ("accelerate.", "deepspeed.", "lightning.", "pytorch_lightning.", "pytorch_optimizer.optimizer.pcgrad")
"""Beginnings of the modules of wrappers that leave the parameters to the optimizer in their attribute `optimizer`."""


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside wrappers that only pass steps on, such as Accelerate's."""
    while type(optimizer).__module__.startswith(TRANSPARENT) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def check_outermost(optimizer: Optimizer) -> None:
    """Raise ConfigError if this step is part of another optimizer's, such as Lookahead's, which skips the cores."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        other = frame.f_locals.get("self")
        if isinstance(other, Optimizer) and unwrapped(other) is not optimizer:
            raise ConfigError(_wrapper(type(other).__name__, type(optimizer).__name__))
        frame = frame.f_back


def _wrapper(kind: str, inner: str) -> str:
    return (
        f"attach: {kind} cannot be used: it changes parameters before or after the steps of another optimizer "
        f"({inner}), when {inner} does not hold the cores. Train with {inner} alone, or another optimizer that steps "
        "by itself."
    )


def is_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer skips this step: GradScaler calls it even when it has found an infinite gradient."""
    return bool(getattr(optimizer, "found_inf", False))


def ordinary_optimizer(optimizer: Any) -> Optimizer:
    """Return the innermost PyTorch optimizer; a ConfigError if its step is not an ordinary PyTorch step."""
    optimizer = unwrapped(optimizer)
    kind = type(optimizer)
    if kind.__module__.startswith("deepspeed."):
        raise ConfigError(
            f"attach: {kind.__name__} is DeepSpeed's own optimizer, whose step is not PyTorch's. Set "
            '"zero_force_ds_cpu_optimizer": false and "zero_allow_untested_optimizer": true in its configuration, with '
            'an optimizer of PyTorch ("torch_adam": true where the configuration names it).'
        )
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"attach: expected a torch.optim.Optimizer, found {kind.__module__}.{kind.__name__}.")
    for name in (base.__name__ for base in kind.__mro__):
        if name in REFUSED_OPTIMIZERS:
            raise ConfigError(f"attach: {kind.__name__} cannot be used: {REFUSED_OPTIMIZERS[name]}.")
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise ConfigError(
            f"attach: {kind.__name__} cannot be used: its train and eval modes swap parameters outside of a step, when "
            "it does not hold the cores. Use an optimizer without modes, such as AdamW with a learning-rate schedule."
        )
    for value in vars(optimizer).values():
        held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        if inner := next((one for one in held if isinstance(one, Optimizer)), None):
            raise ConfigError(_wrapper(kind.__name__, type(inner).__name__))
    if isinstance(optimizer, Adagrad) and Version(torch.__version__) < Version("2.12"):
        raise ConfigError(
            f"attach: Adagrad of torch {torch.__version__} makes its state when it is built, so the cores would have "
            "none; upgrade to torch 2.12, or use another optimizer."
        )
    return optimizer


def converted(moments: Mapping[str, Tensor], convert: Callable[[Tensor, bool], Tensor]) -> dict[str, Tensor]:
    """Convert an optimizer's means of gradients, and of their squares, into another basis.

    A centred RMSprop divides by the root of square_avg - grad_avg^2, which would become negative if both were converted
    by themselves. What is converted in the place of its squares is that variance.
    """
    given = dict(moments)
    is_centred = {"square_avg", "grad_avg"} <= given.keys()
    if is_centred:
        given["square_avg"] = (given["square_avg"] - given["grad_avg"].square()).clamp(min=0)
    found = {key: convert(moment, key in SQUARED) for key, moment in given.items()}
    if is_centred:
        found["square_avg"] = found["square_avg"] + found["grad_avg"].square()
    return found


class StepGuard:
    """A function that is called whenever `optimizer.step` raises, until `remove`.

    Learning-rate schedulers and Accelerate also wrap `step`, before or after the guard, which keeps their wrappers.
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
    """A refusal of `copy` and `pickle` of an optimizer, until `remove`: its copy would have no hooks."""

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
