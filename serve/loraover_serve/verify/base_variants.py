"""The base model in PyTorch as engines compute it wrongly: an extra token, other positions, a window, other layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from loraover_serve.judge.names import BASE_LAYERS, EXTRA_TOKEN, POSITIONS, WINDOW

Change = Callable[[], AbstractContextManager[tuple[int, ...]]]
"""Context manager that changes the model during a block, and yields the tokens to read before each prompt."""

Rounding = Callable[[Tensor], Tensor]

THETAS = (10_000.0, 500_000.0, 1_000_000.0)
WINDOWS = (8, 16, 32, 64, 128)


def base_faults(model: Any, longest: int) -> Iterator[tuple[str, str, Change, int]]:
    """Yield the name of each fault, the fault in words, what makes it, and the first layer that it changes.

    Args:
        model: The base model.
        longest: Number of tokens of the longest prompt.
    """
    config = model.config.get_text_config()
    if config.bos_token_id is not None:
        added = (int(config.bos_token_id),)
        yield EXTRA_TOKEN, "a begin-of-text token is added", lambda: nullcontext(added), 0
    rotary = next(
        (module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), torch.Tensor)), None
    )
    if rotary is not None:
        mine = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
        for theta in THETAS:
            if theta != mine:
                yield POSITIONS, f"rope_theta is {theta:g} instead of {mine}", partial(_rotated, rotary, theta), 0
    layers = _layers(model)
    for size in WINDOWS:
        if size < longest and layers:
            yield WINDOW, f"attention reaches {size} tokens back", partial(_windowed, layers, size), 0
    for index, layer in enumerate(chain_of(model)):
        yield BASE_LAYERS, f"layer {index} is missing", partial(_skipping, layer), index
        if index + 1 < len(layers):
            yield BASE_LAYERS, f"layers {index} and {index + 1} are swapped", partial(_swapped, layers, index), index


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


@contextmanager
def _skipping(layer: nn.Module) -> Iterator[tuple[int, ...]]:
    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with layer.register_forward_hook(skip, with_kwargs=True):
        yield ()


@contextmanager
def _swapped(layers: nn.ModuleList, index: int) -> Iterator[tuple[int, ...]]:
    def swap() -> None:
        layers[index], layers[index + 1] = layers[index + 1], layers[index]

    swap()
    try:
        yield ()
    finally:
        swap()
