"""Base models larger than memory: weights that stay in their files, and are read whenever an operation needs them.

transformers finds the place of each weight in the files, and accelerate reads it. accelerate's own way to run such a
model is a hook that fills a module's parameters before it runs, and empties them afterwards. That hook is not used: it
would put the base weights back where an adapter has replaced them, and PEFT 0.21 cannot load an adapter on a model that
is on the CPU and the disk only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from loraover.common.errors import ConfigError


@final
class StreamedWeight(Tensor):
    """A weight that each operation on it reads from its file, and releases afterwards.

    Hooks and operations see a tensor of the model's dtype on the model's device. Nothing can be written to it. A copy
    is an ordinary parameter in memory.

    Args:
        read: Function that reads the weight, in its dtype and onto its device.
        like: Tensor of its shape and dtype.
        device: Its device.
    """

    _read: Callable[[], Tensor]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as PyTorch documents it

    @staticmethod
    def __new__(cls, read: Callable[[], Tensor], like: Tensor, device: torch.device) -> StreamedWeight:
        made: StreamedWeight = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=device)
        made._read = read
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method, as PyTorch documents it
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:  # nn.Parameter asks for it, and holds what it gets
            return cls(args[0]._read, args[0], args[0].device)
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} would write to a weight that stays in its file.")
        with torch.inference_mode(False), torch.no_grad():  # a view of a weight has to be as ordinary as the weight
            args, kwargs = tree_map_only(cls, lambda weight: weight._read(), (args, kwargs or {}))
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return nn.Parameter(self._read().clone(), requires_grad=False)


def in_files() -> tuple[dict[str, Any], tempfile.TemporaryDirectory[str]]:
    """Return the arguments with which transformers leaves a model's weights in its files, and a folder for others.

    The folder takes weights that transformers changes when it loads them, such as experts that it stacks.
    """
    folder = tempfile.TemporaryDirectory(prefix="loraover-weights-")
    return {"device_map": {"": "disk"}, "offload_folder": folder.name}, folder


def read_when_used(model: Any, device: torch.device, folder: tempfile.TemporaryDirectory[str]) -> None:
    """Let a model that was loaded with the arguments of `in_files` read its weights whenever it uses them.

    Args:
        model: The model, which is changed.
        device: Device to run it on.
        folder: Folder of `in_files`, which is deleted with the last weight.

    Raises:
        ConfigError: The files lack a weight of the model.
    """
    from accelerate.hooks import remove_hook_from_module

    maps = (getattr(getattr(module, "_hf_hook", None), "weights_map", None) for module in model.modules())
    weights = next(found.dataset for found in maps if found is not None)
    weights.folder = folder

    def read(name: str) -> Tensor:
        found: Tensor = weights[name]
        return found.to(device)

    modules = dict(model.named_modules())
    places = [(name, *name.rpartition(".")[::2]) for name, _ in model.named_parameters(remove_duplicate=False)]
    lacking = [name for name, _, _ in places if name not in weights.index]
    if lacking:
        raise ConfigError(
            f"the files have no {', '.join(lacking[:3])}, and a model that is read from its files needs all its "
            "weights there; save it with them, or run it where it fits into memory."
        )
    remove_hook_from_module(model, recurse=True)
    made: dict[tuple[str, str], nn.Parameter] = {}
    for name, path, attribute in places:
        module, stored = modules[path], weights.index[name]
        key = stored["safetensors_file"], stored.get("weight_name", name)  # tied weights stay one
        if key not in made:
            like = getattr(module, attribute)
            made[key] = nn.Parameter(StreamedWeight(partial(read, name), like, device), requires_grad=False)
        setattr(module, attribute, made[key])
    for module in modules.values():
        module._buffers.update({name: b.to(device) for name, b in module._buffers.items() if b is not None})
    del model.hf_device_map
