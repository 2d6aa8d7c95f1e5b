"""The files of a base model: its tensors, by shard, and everything that comes along with them."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from loraover.checkpoint.header_facts import INDEX, SINGLE, ShardIndex
from loraover.checkpoint.model_facts import CONFIG
from loraover.checkpoint.tensor_file import TensorFile, open_tensors
from loraover.common.errors import CheckpointError, ConfigError, ExportError
from loraover.common.strict_json import read_json
from loraover.models.load import ModelSource
from loraover.sources.fetch import MODEL_FILES
from loraover.sources.hub import fetch_repository

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json", ".ot")
LEFT_BEHIND = (*WEIGHTS, "adapter_config.json", "_certificate.json", "attestation.json", ".sig")
"""Endings of files that a merged model does not need; with `adapter_config.json`, transformers takes it for an adapter.
Statements and signatures are of the base model's own files."""
REPLACED = (CONFIG, "README.md", ".gitattributes")

UNQUANTISED = "merge into the unquantised model that it was made from, and quantise the result"


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
    """Say in the errors of a block that a damaged file is one of the base model's."""
    try:
        yield
    except CheckpointError as error:
        raise BaseFileError(f"model: {source.origin}: {error}") from error


@dataclass(frozen=True)
class BaseFiles:
    """A base model's folder.

    Args:
        folder: The folder.
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
            try:
                shutil.copyfile(path, folder / path.name)
            except OSError as error:
                if error.filename != str(path):
                    raise
                raise ConfigError(
                    f"model: {path}: cannot be read: {error.strerror}; make it readable, or move it elsewhere."
                ) from error


def check_not_gguf(model: str | None) -> None:
    """Raise ExportError if a base model is named by a GGUF file."""
    if model is not None and model.lower().endswith(".gguf"):
        raise ExportError(f"{model} is a GGUF file, whose weights are quantised or in another layout; {UNQUANTISED}.")


def open_base(source: ModelSource, stack: ExitStack, *, may_be_quantised: bool = False) -> BaseFiles:
    """Open a base model's files for as long as a stack of contexts lasts.

    Args:
        source: Place of the model.
        stack: The stack.
        may_be_quantised: Whether a quantised model is taken, of which some tensors are not.

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
    """Return the names of the safetensors files of a base model, all of which are there."""
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

    Args:
        skeleton: The model, without weights.
        keys: All keys in the files.
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
