"""A stand-in for an Apple GPU on a machine without one: tensors that say they are on `mps`, and refuse float64.

All numbers are computed on the CPU. The stand-in only keeps track of where a tensor would lie: a result lies where one
of its arguments does, `cpu` and `to` move it, and float64 is refused there with torch's own message.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, MPS = torch.device("cpu"), torch.device("mps")
GET_DEVICE = Tensor.device.__get__
REFUSAL = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."


@contextmanager
def apple_gpu(model: nn.Module) -> Iterator[None]:
    """Put the model, and all that the block computes from it, on a stand-in for an Apple GPU."""
    for tensor in (*model.parameters(), *model.buffers()):
        _put_there(tensor)
    generator = torch.Generator()
    random: dict[str, Any] = {
        "get_rng_state": generator.get_state,
        "set_rng_state": generator.set_state,
        "manual_seed": generator.manual_seed,
    }
    with patch.object(torch, "autocast", _no_autocast), patch.multiple(torch.mps, **random), _Apple():
        yield


def _is_there(value: Any) -> bool:
    return isinstance(value, Tensor) and getattr(value, "_is_on_apple", False)


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value == "mps")


def _put_there(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.dtype == torch.float64:
            raise TypeError(REFUSAL)
        value._is_on_apple = True  # type: ignore[attr-defined]
    return value


class _Apple(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        is_there = any(map(_is_there, tree_leaves((args, kwargs))))
        if func == GET_DEVICE:
            return MPS if is_there else func(*args)
        if is_there and func in (Tensor.double, Tensor.to) and (func is Tensor.double or torch.float64 in args):
            raise TypeError(REFUSAL)  # torch converts first and moves then
        named = [torch.device(value) for value in tree_leaves((args, kwargs)) if _is_device(value)]
        args, kwargs = tree_map(lambda value: CPU if _is_device(value) else value, (args, kwargs))
        found = func(*args, **kwargs)
        if func is Tensor.cpu or CPU in named:
            return found.clone() if is_there else found
        return tree_map(_put_there, found) if is_there or MPS in named else found


@contextmanager
def _no_autocast(device: str, enabled: bool) -> Iterator[None]:
    """Torch without Apple's support has no such autocast."""
    assert (device, enabled) == ("mps", False)
    yield
