"""Coarser number formats: PyTorch runs a model in them to show the error of an engine that does so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from loraover.models.device import COMPUTE_DTYPES
from loraover.models.streaming import change_rows

Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class NumberFormat:
    """A coarser number format.

    Args:
        weights: Rounding of a weight matrix.
        outputs: Rounding of each layer's outputs; None if only weights are rounded.
    """

    weights: Round
    outputs: Round | None = None


def _cast(dtype: torch.dtype) -> Round:
    return lambda x: x.to(dtype).to(x.dtype)


def _levels(largest: int, block: int | None) -> Round:
    """Rounding to integer multiples of a scale, one for each row or for each block of a row."""

    def round_(x: Tensor) -> Tensor:
        width = x.shape[-1]
        size = block or width
        whole = nn.functional.pad(x, (0, -width % size)) if width % size else x
        blocks = whole.reshape(*x.shape[:-1], -1, size)
        scale = _scale(blocks, largest)
        return (blocks / scale).round_().mul_(scale).flatten(-2)[..., :width].contiguous()

    return round_


def _scale(x: Tensor, largest: float) -> Tensor:
    """Scale of each row, (..., 1), with which the largest number of a format is the row's."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    return torch.maximum(-low, high).clamp_min_(torch.finfo(x.dtype).tiny) / largest


def _float8(x: Tensor) -> Tensor:
    """Rounding to float8 with 4 bits of exponent and 3 of mantissa, with one scale for each row."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = _scale(x, largest)
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


FORMATS = {
    "fp16": NumberFormat(_cast(torch.float16), _cast(torch.float16)),
    "bf16": NumberFormat(_cast(torch.bfloat16), _cast(torch.bfloat16)),
    "int8": NumberFormat(_levels(127, None)),
    "fp8": NumberFormat(_float8),
    "int4": NumberFormat(_levels(7, 32)),
}
"""Number formats from fine to coarse: the floating-point ones round weights and layers' outputs, the others weights."""


def as_served(name: str, computed: str) -> NumberFormat:
    """Return the error of a server in a number format, relative to PyTorch in its data type.

    PyTorch in float32 counts as exact. If PyTorch computes as coarsely as the server, the two round differently; a
    further random rounding of each layer's outputs stands for this.

    Args:
        name: The server's number format, one of `FORMATS`.
        computed: Data type in which PyTorch computes: fp32, bf16, fp16 or fp64.
    """
    if computed not in FORMATS:
        return FORMATS[name]
    if name not in COMPUTE_DTYPES:
        return NumberFormat(FORMATS[name].weights, _at_random())
    mine, theirs = (torch.finfo(getattr(torch, COMPUTE_DTYPES[kind])).eps for kind in (computed, name))
    return NumberFormat(lambda x: x, _at_random()) if mine >= theirs else FORMATS[name]


def _at_random() -> Round:
    """Rounding after a random change by up to half a unit in the last place."""
    seeds = count()

    def round_(x: Tensor) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(next(seeds))
        drawn = torch.rand(x.shape, generator=generator, device=x.device) - 0.5
        return (x.float() * (1 + drawn * torch.finfo(x.dtype).eps)).to(x.dtype)

    return round_


def _each(output: Any, round_: Round) -> Any:
    """Round a layer's output, or each tensor of numbers of several, such as the router of a mixture of experts has."""
    if isinstance(output, tuple):
        return tuple(_each(part, round_) for part in output)
    return round_(output) if isinstance(output, Tensor) and output.is_floating_point() else output


@contextmanager
def rounding(model: nn.Module, format_: NumberFormat) -> Iterator[None]:
    """Run a model in a coarser number format for a block; one rounded layer at a time is in memory.

    Of an embedding, only the rows of its tokens are rounded.

    Args:
        format_: The number format.
    """
    exact: dict[nn.Module, nn.Parameter] = {}

    def before(module: Any, args: tuple[Any, ...]) -> None:
        if type(module) is nn.Embedding:
            return
        exact[module] = module.weight
        if module.weight.is_floating_point():  # else the base model is quantised, and its weights are coarse already
            module.weight = nn.Parameter(change_rows(module.weight, format_.weights), requires_grad=False)

    def after(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        if type(module) is nn.Embedding:
            output = format_.weights(output)
        else:
            module.weight = exact.pop(module)
        return output if format_.outputs is None else _each(output, format_.outputs)

    with ExitStack() as hooks:
        for module in model.modules():
            if module._parameters.get("weight") is not None:
                hooks.enter_context(module.register_forward_pre_hook(before))
                hooks.enter_context(module.register_forward_hook(after))
        try:
            yield
        finally:
            for module, weight in exact.items():
                module.register_parameter("weight", weight)
