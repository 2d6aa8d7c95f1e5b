"""The base model in PyTorch as engines compute it wrongly: an extra token, other positions, a window, other layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from loraover_serve.judge.names import BASE_LAYERS, EXTRA_TOKEN, POSITIONS, WINDOW
from loraover_serve.verify.layers import Edit

Change = Callable[[], AbstractContextManager[tuple[int, ...]]]
"""Context manager that changes the model during a block, and yields the tokens to read before each prompt."""

Rounding = Callable[[Tensor], Tensor]

THETAS = (10_000.0, 500_000.0, 1_000_000.0)
WINDOWS = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class FaultyBase:
    """A fault of the base model.

    Args:
        detail: The fault in words.
        change: Context manager that makes it.
        layer: Index of the first layer that it changes.
        edits: The same fault as changes of modules' outputs, by the module; None if it has to run alone.
    """

    fault: str
    detail: str
    change: Change
    layer: int = 0
    edits: Mapping[nn.Module, Edit] | None = None


def base_faults(model: Any, longest: int) -> Iterator[FaultyBase]:
    """Yield the faults of a base model.

    Args:
        model: The base model.
        longest: Number of tokens of the longest prompt.
    """
    config = model.config.get_text_config()
    if config.bos_token_id is not None:
        added = (int(config.bos_token_id),)
        yield FaultyBase(EXTRA_TOKEN, "a begin-of-text token is added", lambda: nullcontext(added))
    rotary = next(
        (module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), torch.Tensor)), None
    )
    if rotary is not None:
        mine = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
        for theta in THETAS:
            if theta != mine:
                detail = f"rope_theta is {theta:g} instead of {mine}"
                yield FaultyBase(POSITIONS, detail, partial(_rotated, rotary, theta))
    layers = _layers(model)
    for size in WINDOWS:
        if size < longest and layers:
            yield FaultyBase(WINDOW, f"attention reaches {size} tokens back", partial(_windowed, layers, size))
    for index, layer in enumerate(chain_of(model)):
        skipping = partial(_skipping, layer)
        yield FaultyBase(BASE_LAYERS, f"layer {index} is missing", skipping, index, {layer: _skip})
        if index + 1 < len(layers):
            detail, swapping = f"layers {index} and {index + 1} are swapped", partial(_swapped, layers, index)
            yield FaultyBase(BASE_LAYERS, detail, swapping, index, _exchange(layer, layers[index + 1]))


def nearest(x: Tensor) -> Tensor:
    """Round to float8 with 4 bits of exponent, as GPUs do."""
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def toward_zero(x: Tensor) -> Tensor:
    """Cut off what float8 with 4 bits of exponent does not hold, as vLLM 0.32 for CPU does."""
    near = x.to(torch.float8_e4m3fn)
    bits = near.view(torch.uint8)  # a sign and a magnitude, so that 1 less is the next number towards zero
    cut = torch.where(near.to(x.dtype).abs() > x.abs(), bits - 1, bits)
    return cut.view(torch.float8_e4m3fn).to(x.dtype)


CACHE_ROUNDINGS: Mapping[str, Rounding] = {"rounded": nearest, "cut": toward_zero}
"""How engines hold keys and values in float8, without a scale, which is the default of vLLM and SGLang."""


class Float8Cache(DynamicCache):
    """Keys and values in float8.

    Args:
        rounding: Function that rounds them.
    """

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self._rounding = rounding

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        coarse = map(self._rounding, (key_states, value_states))
        found: tuple[Tensor, Tensor] = super().update(*coarse, *args, **kwargs)
        return found


@contextmanager
def coarse_cache(model: nn.Module, rounding: Rounding) -> Iterator[None]:
    """Hold a model's keys and values in float8 for a block."""

    def cached(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"use_cache": True, "past_key_values": Float8Cache(rounding)}

    with model.register_forward_pre_hook(cached, with_kwargs=True):
        yield


def chain_of(model: Any) -> nn.ModuleList:
    """The model's layers, if each computes from the output of the one before it alone; else none."""
    reads_earlier_keys = getattr(model.config.get_text_config(), "num_kv_shared_layers", 0)  # as Gemma 3n does
    return nn.ModuleList() if reads_earlier_keys else _layers(model)


def _layers(model: Any) -> nn.ModuleList:
    number = model.config.get_text_config().num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == number)
    return next(lists, nn.ModuleList())


@contextmanager
def _rotated(rotary: Any, theta: float) -> Iterator[tuple[int, ...]]:
    exact = rotary.inv_freq
    steps = torch.arange(len(exact), device=exact.device, dtype=torch.float32) / len(exact)
    rotary.inv_freq = (theta**-steps).to(exact)
    try:
        yield ()
    finally:
        rotary.inv_freq = exact


@contextmanager
def _windowed(layers: nn.ModuleList, size: int) -> Iterator[tuple[int, ...]]:
    def narrow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        places = torch.arange(hidden.shape[1], device=hidden.device)
        far = places[None, :] - places[:, None]
        seen = (far <= 0) & (far > -size)
        mask = torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
        return args, kwargs | {"attention_mask": mask[None, None]}

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(narrow, with_kwargs=True))
        yield ()


def _skip(layer: nn.Module, given: Tensor, output: Tensor) -> None:
    """Give a layer's input for its output."""
    output.copy_(given)


@contextmanager
def _skipping(layer: nn.Module) -> Iterator[tuple[int, ...]]:
    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with layer.register_forward_hook(skip, with_kwargs=True):
        yield ()


def _exchange(one: nn.Module, other: nn.Module) -> dict[nn.Module, Edit] | None:
    """The changes that let each of two layers compute with the other's weights.

    Returns:
        The changes by the innermost modules; None if the layers differ in more than these modules' weights.
    """
    mine, theirs = list(one.named_modules()), list(other.named_modules())
    if len(mine) != len(theirs) or any(
        name != its_name or _makeup(module) != _makeup(its) or not _are_equal(module, its)
        for (name, module), (its_name, its) in zip(mine, theirs, strict=True)
    ):
        return None
    pairs = [(a, b) for (_, a), (_, b) in zip(mine, theirs, strict=True) if a._parameters]
    if not all(_maps_rows(module) for module, _ in pairs):
        return None
    return {a: partial(_computed_by, b) for a, b in pairs} | {b: partial(_computed_by, a) for a, b in pairs}


def _makeup(module: nn.Module) -> tuple[Any, ...]:
    """The class of a module, the sizes of its parameters, and its settings, but for the index of its layer."""
    plain = (bool, int, float, str, type(None))
    settings = {key: value for key, value in vars(module).items() if key != "layer_idx" and isinstance(value, plain)}
    return type(module), {name: getattr(each, "shape", None) for name, each in module._parameters.items()}, settings


def _are_equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have equal buffers."""
    pairs = [(buffer, other._buffers.get(name)) for name, buffer in one._buffers.items()]
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _maps_rows(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a norm, which maps one input to one output."""
    from transformers.pytorch_utils import Conv1D

    is_norm = all(each is None or each.dim() == 1 for each in module._parameters.values())
    is_known = isinstance(module, nn.Linear | Conv1D) or is_norm
    return is_known and not [*module.children()] and len(inspect.signature(module.forward).parameters) == 1


def _computed_by(other: nn.Module, module: nn.Module, given: Tensor, output: Tensor) -> None:
    """Give what another module computes."""
    output.copy_(other.forward(given))


@contextmanager
def _swapped(layers: nn.ModuleList, index: int) -> Iterator[tuple[int, ...]]:
    def swap() -> None:
        layers[index], layers[index + 1] = layers[index + 1], layers[index]

    swap()
    try:
        yield ()
    finally:
        swap()
