"""Plan of a merge for every tensor of a base model, made from names and shapes before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loraover.adapters.base_weights import UNQUANTISED, BaseFiles, stored_keys
from loraover.checkpoint.base_modules import replaced_parameters, target_module
from loraover.checkpoint.files import CONFIG_FILE
from loraover.checkpoint.model_facts import CONFIG
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.checkpoint.target_modules import check_saved
from loraover.checkpoint.tensor_file import FLOATS, TensorFile
from loraover.common.errors import ConfigError, ExportError
from loraover.models.load import ModelSource, load_skeleton
from loraover_export.requests import MergeRequest


@dataclass(frozen=True)
class PlannedTensor:
    """Tensor of the merged model.

    Args:
        key: Its key in the merged model's file.
        read: Key of the base model's tensor that it begins with, in the same shard.
        replaced: Key of the adapter's tensor that it begins with instead; None if there is none.
        module: Adapted module whose delta is added; None if there is none.
        layer: Adapted module of the base model, without weights; None if there is none.
    """

    key: str
    read: str
    replaced: str | None = None
    module: str | None = None
    layer: nn.Module | None = None

    @property
    def changes(self) -> bool:
        """Whether it differs from the base model's tensor."""
        return self.replaced is not None or self.module is not None


@dataclass(frozen=True)
class MergePlan:
    """Tensors of the merged model by shard, and whether weights that were tied have become different.

    Args:
        shards: Tensors of each file.
        untied: Names of weights that shared a tensor, and no longer do.
    """

    shards: Mapping[str, list[PlannedTensor]]
    untied: list[str]

    @property
    def changed(self) -> list[PlannedTensor]:
        """The tensors that differ from the base model's."""
        return [planned for shard in self.shards.values() for planned in shard if planned.changes]


def plan_merge(source: ModelSource, base: BaseFiles, adapter: AdapterDir, plain: TensorFile) -> MergePlan:
    """Decide what becomes of every tensor."""
    skeleton = load_skeleton(source)
    adapter.check_complete((path for path, _ in skeleton.named_modules()), skeleton.config.model_type)
    names = _Names(skeleton, base, source)
    check_saved(adapter.path / CONFIG_FILE, adapter.others.values(), names.parameters)
    replacing = replaced_parameters(skeleton, adapter, plain)
    changes: dict[str, tuple[str | None, str | None]] = {name: (key, None) for name, key in replacing.items()}
    for path in adapter.modules:
        target_module(skeleton, adapter, path)
        changes[f"{path}.weight"] = (replacing.get(f"{path}.weight"), path)
    tied = _untied(names, changes, plain)
    shards = {shard: {key: PlannedTensor(key, key) for key in file.keys} for shard, file in base.shards.items()}
    for name, (replaced, module) in (dict.fromkeys(tied, (None, None)) | changes).items():
        shard, read = names.place(name)
        key = (names.own_key(name) or name) if name in tied else read
        layer = None if module is None else skeleton.get_submodule(module)
        file, expected = base.shards[shard], tuple(names.parameters[name].shape)
        if file.dtype(read) not in FLOATS:
            raise ExportError(
                f"{source.origin}: {read} is {file.dtype(read)}, so the model is quantised; {UNQUANTISED}."
            )
        if file.shape(read) != expected:
            raise ConfigError(
                f"model: {source.origin}: {read} has shape {file.shape(read)} in the files, and {CONFIG} makes it "
                f"{expected}; they do not belong together, so fetch the model again."
            )
        shards[shard][key] = PlannedTensor(key, read, replaced, module, layer)
    return MergePlan({shard: list(tensors.values()) for shard, tensors in shards.items()}, tied)


class _Names:
    """Where the base model's files hold its parameters."""

    def __init__(self, skeleton: Any, base: BaseFiles, source: ModelSource) -> None:
        self.parameters = dict(skeleton.named_parameters(remove_duplicate=False))
        self._source = source
        self._shards = {key: shard for shard, file in base.shards.items() for key in file.keys}
        self._keys = stored_keys(skeleton, self._shards)

    def sharing(self, name: str) -> list[str]:
        """Return all names of the tensor that a parameter uses, the parameter's included."""
        return [other for other, found in self.parameters.items() if found is self.parameters[name]]

    def own_key(self, name: str) -> str | None:
        """Return the key of a parameter's tensor in the files; None if the tensor has another parameter's key."""
        return self._keys.get(name)

    def place(self, name: str) -> tuple[str, str]:
        """Return the shard and the key of a parameter, or of another that it shares its tensor with.

        Raises:
            ExportError: There is none, since transformers makes the parameter from other tensors.
        """
        for key in map(self.own_key, (name, *self.sharing(name))):
            if key is not None:
                return self._shards[key], key
        raise ExportError(
            f"{self._source.origin}: its files hold no tensor {name!r}, which transformers makes from others when it "
            "loads the model. Load it, save it with save_pretrained(..., save_original_format=False), and name that "
            f"folder with {MergeRequest.named('model')}."
        )


def _untied(names: _Names, changes: Mapping[str, tuple[str | None, str | None]], plain: TensorFile) -> list[str]:
    """Return all names of the parameters that share a tensor and are changed, unless all are replaced alike."""
    found: dict[str, None] = {}
    for name in changes:
        sharing = names.sharing(name)
        if len(sharing) > 2:
            raise ExportError(
                f"{name} shares its weight with {', '.join(other for other in sharing if other != name)}, and "
                "config.json cannot say that only one of them changed; adapt other layers only."
            )
        keys = [changes.get(other, (None, None)) for other in sharing]
        replaced = [key for key, module in keys if key is not None and module is None]
        alike = len(replaced) == 2 and (replaced[0] == replaced[1] or torch.equal(*map(plain.read, replaced)))
        if len(sharing) == 2 and not alike:
            found |= dict.fromkeys(sharing)
    return list(found)
