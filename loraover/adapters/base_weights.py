"""A base model's files: its tensors by shard, what comes along with them, and the weights of its modules.

Weights are read from safetensors files one tensor at a time, without loading the model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict

from loraover.checkpoint.model_facts import CONFIG, INDEX, SINGLE, ShardIndex
from loraover.checkpoint.peft_adapter import BASE_WEIGHT, KEY_PREFIX, AdapterDir
from loraover.checkpoint.tensor_file import TensorFile, open_tensors
from loraover.common.errors import CheckpointError, ConfigError, ExportError
from loraover.common.request import as_written
from loraover.common.strict_json import read_json
from loraover.models.load import ModelSource, load_skeleton
from loraover.sources.fetch import MODEL_FILES
from loraover.sources.hub import fetch_repository

if TYPE_CHECKING:
    from torch import Tensor


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json", ".ot")
LEFT_BEHIND = (*WEIGHTS, "adapter_config.json", "_certificate.json", "attestation.json", ".sig")
"""Endings of files that a merged model does not need; with `adapter_config.json`, transformers takes it for an adapter.
Statements and signatures are of the base model's own files."""
REPLACED = (CONFIG, "README.md", ".gitattributes")

UNQUANTISED = "merge into the unquantised base model, and quantise the result"


class _BaseConfig(BaseModel):
    """Contents of `config.json`, with the types of the fields that are read here."""

    model_config = ConfigDict(extra="allow")

    quantization_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None


Contents = TypeVar("Contents", bound=BaseModel)


class BaseFileError(CheckpointError, ConfigError):
    """A file of the base model that is missing or damaged, which says nothing about an adapter."""


@contextmanager
def of_base(source: ModelSource) -> Iterator[None]:
    """Say in the errors of a block that a damaged file belongs to the base model."""
    try:
        yield
    except CheckpointError as error:
        raise BaseFileError(f"model: {source.origin}: {error}") from error


@dataclass(frozen=True)
class BaseFiles:
    """A base model's folder.

    Args:
        config: Contents of `config.json`.
        shards: Files with tensors, by name; each is open.
    """

    folder: Path
    config: dict[str, Any]
    shards: Mapping[str, TensorFile]

    def copy_along(self, folder: Path) -> None:
        """Copy the files that a merged model needs too, such as those of the tokenizer.

        Raises:
            ConfigError: A file that cannot be read.
            OSError: A file that cannot be written.
        """
        found = (path for path in sorted(self.folder.iterdir()) if path.is_file())
        for path in (path for path in found if not path.name.endswith(LEFT_BEHIND) and path.name not in REPLACED):
            with (folder / path.name).open("wb") as copy:
                copy.writelines(_pieces(path))


def _pieces(path: Path) -> Iterator[bytes]:
    """Read a file piece by piece, so that an error of reading is never taken for one of writing."""
    try:
        with path.open("rb") as file:
            while piece := file.read(2**24):
                yield piece
    except OSError as error:
        raise ConfigError(
            f"model: {path}: cannot be read: {error.strerror}; make it readable, or move it elsewhere."
        ) from error


def check_not_gguf(model: str | None) -> None:
    """Raise ExportError if a base model is named by a GGUF file."""
    if model is not None and model.lower().endswith(".gguf"):
        raise ExportError(f"{model} is a GGUF file, whose weights are quantised or in another layout; {UNQUANTISED}.")


def open_files(source: ModelSource, stack: ExitStack, *, may_be_quantised: bool = False) -> BaseFiles:
    """Open a base model's files for as long as a stack of contexts lasts.

    Args:
        source: Place of the model.
        may_be_quantised: Whether a quantised model is accepted, some of whose tensors are not quantised.

    Raises:
        ConfigError: No usable `config.json`, no safetensors files, or an index that does not fit them.
        ExportError: A quantised model.
        BaseFileError: A damaged file.
    """
    folder = folder_of(source)
    config = _read(folder / CONFIG, _BaseConfig, source)
    if config.quantization_config and not may_be_quantised:
        method = config.quantization_config.get("quant_method", "an unnamed method")
        raise ExportError(f"{source.origin} is quantised ({method}), and a sum would be rounded again; {UNQUANTISED}.")
    names = _shard_names(folder, source)
    with of_base(source):
        shards = {name: stack.enter_context(open_tensors(folder / name)) for name in names}
    counts = Counter(key for shard in shards.values() for key in shard.keys)
    twice = next((key for key, count in counts.items() if count > 1), None)
    if twice is not None:
        raise ConfigError(
            f"model: {source.origin}: several of its files hold a tensor {twice!r}; save it again with save_pretrained."
        )
    return BaseFiles(folder, config.model_dump(exclude_unset=True), shards)


def _shard_names(folder: Path, source: ModelSource) -> list[str]:
    """Return the names of a base model's safetensors files, after checking that all exist."""
    present = {path.name for path in folder.iterdir() if path.is_file()}
    if SINGLE in present:  # as transformers does, which takes it before an index beside it
        return [SINGLE]
    if INDEX in present:
        names = sorted(set(_read(folder / INDEX, ShardIndex, source).weight_map.values()))
        wrong = [name for name in names if name not in present or not name.endswith(".safetensors")]
        if wrong:
            raise ConfigError(
                f"model: {source.origin}: {INDEX} names {wrong[0]!r:.80}, which is not a safetensors file in the "
                "folder; fetch the model again, or save it with save_pretrained."
            )
        return names
    found = sorted(name for name in present if name.endswith(WEIGHTS))
    raise ConfigError(
        f"model: {source.origin} has no {SINGLE} and no {INDEX}; it has {', '.join(found[:3]) or 'no weights'}. "
        "Save it again with save_pretrained."
    )


def stored_keys(skeleton: Any, keys: Collection[str]) -> dict[str, str]:
    """Return the key of each parameter of a model in its files, which may have other names, such as those of LLaVA.

    transformers renames them as it loads and saves the model. A parameter that it makes of several tensors, or changes,
    has no key.
    """
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    loaded = loaded_names(skeleton, keys).items()
    return {name: key for key, (name, is_changed) in loaded if name in parameters and not is_changed}


def loaded_names(skeleton: Any, keys: Collection[str]) -> dict[str, tuple[str, bool]]:
    """Return transformers' name of each stored tensor, and whether it changes the tensor as it loads it."""
    prefix, state = skeleton.base_model_prefix, skeleton.state_dict()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:  # before transformers 5, which had patterns of names alone
        mapping = getattr(skeleton, "_checkpoint_conversion_mapping", {})

        older = {}
        for key in keys:  # of the patterns, the first that fits counts
            renamed = (new for old, by in mapping.items() for new, count in (re.subn(old, by, key),) if count)
            name = next(renamed, key)
            names = name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")
            older[key] = next((found for found in names if found in state), name), False
        return older
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    found: dict[str, tuple[str, bool]] = {}
    for key in sorted(keys, key=dot_natural_key):  # some renamings depend on an earlier key
        name, converter = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, converter = key, None
        found[key] = name, converter is not None
    return found


def folder_of(source: ModelSource) -> Path:
    """Return the folder with a base model's files, which lie in the hub's cache once the model has been loaded."""
    if Path(source.location).is_dir():
        return Path(source.location)
    return fetch_repository(source.location, source.revision, "model", MODEL_FILES)


def _read(path: Path, contents: type[Contents], source: ModelSource) -> Contents:
    try:
        return read_json(path, contents, finite=False)  # some models have an infinite limit in their configuration
    except CheckpointError as error:
        raise ConfigError(f"model: {source.origin} has no usable {path.name}: {error}") from error


class BaseWeights:
    """Modules of a base model, with their shapes and, on demand, their weights.

    The modules come from the model's configuration. No file of weights is opened before the first weight is read.
    `modules` has those without weights, on PyTorch's meta device, by path.

    Args:
        source: Place of the model.
        files: Stack that closes the files of weights.
        may_be_quantised: Whether a quantised model is accepted, some of whose weights are not quantised.
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
        """Paths of the modules that share the input embedding's weight, the embedding first; it alone if none share it.

        They may be the output head, and the embeddings of an encoder and a decoder.
        """
        embedding = self.model.get_input_embeddings()
        if embedding is None:
            return []
        alike = [path for path, found in self.modules.items() if found._parameters.get("weight") is embedding.weight]
        return sorted(alike, key=lambda path: self.modules[path] is not embedding)

    def weight(self, path: str) -> Tensor:
        """Read the weight of a module, as it is stored but shaped like `shapes`."""
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
    """Open the weights of a base model; its configuration is read as `load_skeleton` does."""
    with ExitStack() as files:
        yield BaseWeights(source, files, may_be_quantised=may_be_quantised)


def changed_weight(key: str, stored: TensorFile, path: str, base: BaseWeights) -> str | None:
    """Return in words how a base weight in an adapter's file differs from the base model's; None if it does not.

    PEFT saves it beside an adapted embedding, in the type that training loaded it in, and loads it over the base
    model's. Only this weight has the adapter's new or changed rows. It also holds a head that the base model's files
    lack, because it was tied and their configuration does not say so.
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
    """Refuse base weights in an adapter's file, of the shape of the base model's, that are not the base model's."""
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
    from torch import nn

    found = {}
    for path, module in model.named_modules():
        if is_conv1d(module):
            found[path] = tuple(module.weight.shape[::-1])
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            found[path] = tuple(module.weight.shape)
    return found


def is_conv1d(module: Any) -> bool:
    """Whether a module is a linear layer of transformers that keeps its weight transposed, (in, out)."""
    return type(module).__name__ == "Conv1D"


def is_embedding(module: Any) -> bool:
    """Whether a module is an embedding of PyTorch."""
    from torch import nn

    return isinstance(module, nn.Embedding)
