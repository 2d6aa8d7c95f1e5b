"""Weights of a base model, read from its safetensors files one tensor at a time, without loading the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from loraover.adapters.base_files import of_base, stored_keys
from loraover.adapters.base_files import open_base as open_files
from loraover.checkpoint.model_facts import CONFIG
from loraover.checkpoint.peft_adapter import BASE_WEIGHT, KEY_PREFIX, AdapterDir
from loraover.checkpoint.tensor_file import TensorFile, open_tensors
from loraover.common.errors import ConfigError, ExportError
from loraover.common.request import as_written
from loraover.models.load import ModelSource, load_skeleton

if TYPE_CHECKING:
    from torch import Tensor


class BaseWeights:
    """Modules of a base model, with their shapes and, on demand, their weights.

    The modules come from the model's configuration. No file of weights is opened before the first weight is read.
    `modules` has those without weights, on PyTorch's meta device, by path.

    Args:
        source: Place of the model.
        files: Stack that closes the files of weights.
        may_be_quantised: Whether a quantised model is taken, of which some weights are not.
    """

    def __init__(self, source: ModelSource, files: ExitStack, *, may_be_quantised: bool = False) -> None:
        self.source = source
        self._files = files
        self._may_be_quantised = may_be_quantised
        self._lock = Lock()
        self.model: Any = load_skeleton(source)
        self.modules: dict[str, Any] = dict(self.model.named_modules())

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape (out_features, in_features) of each linear layer, and (tokens, dimension) of each embedding, by path.

        transformers' Conv1D, which keeps its weight transposed, counts as a linear layer.
        """
        return shapes_of(self.model)

    @cached_property
    def tied(self) -> list[str]:
        """Paths of the modules that share the input embedding's weight, the embedding first; of it alone if none do.

        They may be the output head, and the embeddings of an encoder and a decoder.
        """
        embedding = self.model.get_input_embeddings()
        if embedding is None:
            return []
        alike = [path for path, found in self.modules.items() if found._parameters.get("weight") is embedding.weight]
        return sorted(alike, key=lambda path: self.modules[path] is not embedding)

    def weight(self, path: str) -> Tensor:
        """Read the weight of a module, as it is stored but shaped like `shapes`.

        Raises:
            BaseFileError: A file is damaged, or holds NaN or infinity.
            ConfigError: There are no safetensors files, or they hold no weight of the module, or one of another shape.
            ExportError: The model is quantised.
        """
        key = self._key(path)
        if key is None:
            raise ConfigError(
                f"model: {self.source.origin}: its files hold no tensor {path}.weight, which is needed here."
            )
        with of_base(self.source):
            weight = self._tensors[key].read(key)
        weight = weight.T if is_conv1d(self.modules[path]) else weight
        if not weight.is_floating_point() or tuple(weight.shape) != self.shapes[path]:
            raise ConfigError(
                f"model: {self.source.origin}: {key} is {weight.dtype} of shape {tuple(weight.shape)}, expected "
                f"floating-point numbers of shape {self.shapes[path]}; the files and {CONFIG} do not belong together."
            )
        return weight

    @cached_property
    def _tensors(self) -> dict[str, TensorFile]:
        """The file that holds each tensor, by key."""
        opened = open_files(self.source, self._files, may_be_quantised=self._may_be_quantised)
        shards = opened.shards.values()
        return {key: shard for shard in shards for key in shard.keys}

    @cached_property
    def _keys(self) -> dict[str, str]:
        return stored_keys(self.model, self._tensors)

    def _key(self, path: str) -> str | None:
        """Return the key of a module's weight in the files, where it may be tied; None if they do not hold it."""
        paths = [path, *(self.tied if path in self.tied else ())]
        with self._lock:  # files are opened once
            return next((key for found in paths if (key := self._keys.get(f"{found}.weight")) is not None), None)

    def holds(self, path: str) -> bool:
        """Return whether the files hold the weight of a module."""
        return self._key(path) is not None


@contextmanager
def open_base(source: ModelSource, *, may_be_quantised: bool = False) -> Iterator[BaseWeights]:
    """Open the weights of a base model.

    Raises:
        ConfigError: The model's configuration cannot be used; see `load_skeleton`.
    """
    with ExitStack() as files:
        yield BaseWeights(source, files, may_be_quantised=may_be_quantised)


def changed_weight(key: str, stored: TensorFile, path: str, base: BaseWeights) -> str | None:
    """Return in words how a base weight in an adapter's file differs from the base model's; None if it does not.

    PEFT saves it beside an adapted embedding, in the type that training loaded it in, and loads it over the base
    model's. An adapter's new or changed rows are there and nowhere else, as is a head that the base model's files lack,
    where the head was tied and their configuration does not say so.

    Args:
        key: Key of the weight in the adapter's file.
        stored: The adapter's open file.
        path: Path of the module in the base model, whose weight has the same shape.
        base: The base model.
    """
    if not base.holds(path):
        return f"{key}: its {stored.shape(key)[0]} rows are not in the files of {base.source.name}"
    found = stored.read(key)
    rows = (found != base.weight(path).to(found.dtype)).any(dim=1).nonzero().flatten()
    if not rows.numel():
        return None
    return (
        f"{key}: {rows.numel()} of its {len(found)} rows, the first of them row {int(rows[0])}, are not those of "
        f"{base.source.name}"
    )


def check_base_weights(adapter: AdapterDir, keys: Sequence[str], source: ModelSource, remedy: str) -> None:
    """Refuse base weights in an adapter's file that are not the base model's.

    Args:
        adapter: The adapter.
        keys: Keys of its base weights, each of the shape of the base model's.
        source: The base model, whose weights are read if there are such keys.
        remedy: What to do instead.

    Raises:
        ExportError: A changed weight.
        ConfigError: No safetensors files of the base model; see `BaseWeights.weight`.
    """
    if not keys:
        return
    with open_base(source, may_be_quantised=True) as base, open_tensors(adapter.tensors_path) as file:
        for key in keys:
            refuse_changed(changed_weight(key, file, module_of_copy(key), base), adapter.tensors_path, remedy)


def refuse_changed(changed: str | None, path: Path, remedy: str) -> None:
    """Raise ExportError for what `changed_weight` found in an adapter's file."""
    if changed is not None:
        raise ExportError(
            f"{path}: {changed}, and A and B cannot hold them. Name the changed model with {as_written('model')}, "
            f"or {remedy}."
        )


def module_of_copy(key: str) -> str:
    """Return the path of the module whose frozen weight a tensor of an adapter's file is."""
    return key.removeprefix(KEY_PREFIX).removesuffix(BASE_WEIGHT)


def shapes_of(model: Any) -> dict[str, tuple[int, int]]:
    """Return the shapes of a model's linear layers and embeddings by path, as `BaseWeights.shapes` has them."""
    found = {}
    for path, module in model.named_modules():
        if is_conv1d(module):
            found[path] = tuple(module.weight.shape[::-1])
        elif is_linear(module) or is_embedding(module):
            found[path] = tuple(module.weight.shape)
    return found


def is_linear(module: Any) -> bool:
    """Whether a module is a linear layer of PyTorch."""
    from torch import nn

    return isinstance(module, nn.Linear)


def is_conv1d(module: Any) -> bool:
    """Whether a module is a linear layer of transformers that keeps its weight transposed, (in, out)."""
    return type(module).__name__ == "Conv1D"


def is_embedding(module: Any) -> bool:
    """Whether a module is an embedding of PyTorch."""
    from torch import nn

    return isinstance(module, nn.Embedding)
