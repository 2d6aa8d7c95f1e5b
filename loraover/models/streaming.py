"""Base models larger than memory: weights that stay in their files, and are read whenever an operation needs them.

transformers finds the place of each weight in the files, and accelerate reads it. accelerate's own way to run such a
model is a hook that fills a module's parameters before it runs, and empties them afterwards. That hook is not used: it
would put the base weights back where an adapter has replaced them, and PEFT 0.21 cannot load an adapter on a model that
is on the CPU and the disk only.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from loraover.common.errors import ConfigError

Change = Callable[[Tensor], Tensor]

BLOCK_BYTES = 2**23
"""Largest part of a linear layer's weight that is in memory at once, in its dtype."""


TRIM_THRESHOLD, MMAP_THRESHOLD, GIVEN_BACK_BYTES = -1, -3, 2**18
"""Parameters of glibc's mallopt, and the smallest block that goes back to the kernel when it is freed. By itself, glibc
raises it to 32 MiB, and to twice as much what it keeps free at the heap's end: released weights would stay with the
process."""


@final
class StreamedWeight(Tensor):
    """A weight that each operation on it reads from its file, and releases afterwards.

    Hooks and operations see a tensor of the model's dtype on the model's device. Of an embedding only the rows of its
    tokens are read, and of an index or a view only its part; a linear layer takes a large weight in blocks of rows.
    Nothing can be written to it. A copy is an ordinary parameter in memory.

    Args:
        stored: Function that maps the weight into memory as it is in its file.
        like: Tensor of its shape and dtype.
        device: Its device.
        change: Function that is applied to its rows when they are read; None leaves them as they are.
    """

    _stored: Callable[[], Tensor]
    _change: Change | None

    @staticmethod
    def __new__(
        cls, stored: Callable[[], Tensor], like: Tensor, device: torch.device, change: Change | None = None
    ) -> StreamedWeight:
        made: StreamedWeight = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=device)
        made._stored, made._change = stored, change
        return made

    def _computed(self, stored: Tensor) -> Tensor:
        found = stored.to(self.device, self.dtype)
        return found if self._change is None else self._change(found)

    def _read(self) -> Tensor:
        return self._computed(self._stored())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is nn.functional.linear and isinstance(args[1], cls) and not kwargs:
                return _linear(*args)
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method, as PyTorch documents it
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        weight, *more = args if args and isinstance(args[0], cls) else (None, *args)
        if func is torch.ops.aten.detach.default:  # nn.Parameter asks for it, and holds what it gets
            return cls(weight._stored, weight, weight.device, weight._change)
        if weight is not None and func._schema.is_mutable:
            raise RuntimeError(f"{func} would write to a weight that stays in its file.")
        with torch.inference_mode(False), torch.no_grad():  # a view of a weight has to be as ordinary as the weight
            aten = torch.ops.aten
            is_slice = func is aten.slice.Tensor and more[:1] in ([], [0])
            takes_rows = func is aten.embedding.default or is_slice
            if weight is not None and (takes_rows or (func.is_view and weight._change is None)):
                given = tree_map_only(Tensor, Tensor.cpu, (more, kwargs or {}))  # the tokens
                part = func(weight._stored(), *given[0], **given[1])
                return tree_map_only(Tensor, weight._computed, part)
            args, kwargs = tree_map_only(cls, cls._read, (args, kwargs or {}))
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return nn.Parameter(self._read().clone(), requires_grad=False)


def change_rows(weight: Tensor, change: Change) -> Tensor:
    """Return a weight with a function of single rows applied; rows of a streamed weight change when they are read."""
    if not isinstance(weight, StreamedWeight):
        return change(weight)
    return StreamedWeight(weight._stored, weight, weight.device, change)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b, with a large W in blocks of rows."""
    rows = max(1, BLOCK_BYTES // (weight.shape[1] * weight.element_size()))
    if rows >= len(weight):
        return nn.functional.linear(x, weight[:], bias)
    blocks = (slice(start, start + rows) for start in range(0, len(weight), rows))
    return torch.cat([nn.functional.linear(x, weight[b], None if bias is None else bias[b]) for b in blocks], -1)


def in_files() -> tuple[dict[str, Any], tempfile.TemporaryDirectory[str]]:
    """Return the arguments with which transformers leaves weights in their files, and a folder for those it changes."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # other libraries than glibc have none
        library.mallopt(MMAP_THRESHOLD, GIVEN_BACK_BYTES)
        library.mallopt(TRIM_THRESHOLD, BLOCK_BYTES)
        library.malloc_trim(0)  # what was released before
    folder = tempfile.TemporaryDirectory(prefix="loraover-weights-")
    return {"device_map": {"": "disk"}, "offload_folder": folder.name}, folder


def read_when_used(model: Any, device: torch.device, folder: tempfile.TemporaryDirectory[str]) -> None:
    """Let a model that was loaded as `in_files` says read its weights when used; `folder` is deleted with the last."""
    from accelerate.hooks import remove_hook_from_module
    from safetensors import safe_open

    maps = (getattr(getattr(module, "_hf_hook", None), "weights_map", None) for module in model.modules())
    index = next(found.dataset.index for found in maps if found is not None)

    def stored(file: str, key: str) -> Tensor:
        assert folder.name  # it lasts as long as this function
        with safe_open(file, framework="pt") as opened:
            found: Tensor = opened.get_tensor(key)
        return found

    modules = dict(model.named_modules())
    places = [(name, *name.rpartition(".")[::2]) for name, _ in model.named_parameters(remove_duplicate=False)]
    lacking = [name for name, _, _ in places if name not in index]
    if lacking:
        raise ConfigError(
            f"the files have no {', '.join(lacking[:3])}, and a model that is read from its files needs all its "
            "weights there; save it with them, or run it where it fits into memory."
        )
    remove_hook_from_module(model, recurse=True)
    made: dict[tuple[str, str], nn.Parameter] = {}
    for name, path, attribute in places:
        place = index[name]["safetensors_file"], index[name].get("weight_name", name)
        if place not in made:  # else it is tied to another weight
            weight = StreamedWeight(partial(stored, *place), getattr(modules[path], attribute), device)
            made[place] = nn.Parameter(weight, requires_grad=False)
        setattr(modules[path], attribute, made[place])
    for module in modules.values():
        module._buffers.update({name: b.to(device) for name, b in module._buffers.items() if b is not None})
    del model.hf_device_map
