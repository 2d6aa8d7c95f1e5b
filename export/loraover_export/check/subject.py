"""An adapter of any PEFT method and its base model, read without judging them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from loraover.checkpoint.adapter_config import CONFIG_FILE, AdapterConfig
from loraover.checkpoint.peft_adapter import KEY_PREFIX, TENSORS_FILE, AdapterDir, read_on_base
from loraover.checkpoint.source import META_FILE, read_source
from loraover.checkpoint.tensor_file import open_tensors
from loraover.common.errors import CheckpointError, ConfigError
from loraover.common.paths import kind_of
from loraover.common.strict_json import read_json
from loraover.models.load import resolve_model
from loraover.sources.address import is_elsewhere
from loraover_export.check.request import CheckRequest
from loraover_export.uniform.served import ServedModel, read_served

_MATRIX = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.(?P<kind>lora_(?:embedding_)?)(?P<side>[AB])(?:\.weight)?"
)


class _AnyConfig(BaseModel):
    """Fields that every PEFT method has; other fields are kept unread."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    modules_to_save: list[str] | str | None = None
    target_parameters: list[str] | str | None = None
    trainable_token_indices: dict[str, list[int]] | list[int] | None = None


@dataclass(frozen=True)
class Matrix:
    """An A or B matrix by its tensor key.

    Args:
        module: Path of the adapted module, without PEFT's prefix.
        side: "A" or "B".
        is_embedding: Whether the module is adapted as an embedding.
        has_prefix: Whether the key begins with PEFT's prefix, `base_model.model.`.
        shape: Shape of the tensor.
    """

    module: str
    side: str
    is_embedding: bool
    has_prefix: bool
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """An adapter that is to be judged, and the model under it.

    Args:
        path: Folder of the adapter.
        config: Contents of `adapter_config.json`.
        fields: The fields of the configuration that give rank and scaling; None for other methods than LoRA.
        shapes: Shape of every tensor in the file, by key; of each expert's A and B where the file stacks them.
        lora: The adapter, if it is a plain LoRA that the exports can read.
        unreadable: Reason for which the exports cannot read it; None if they can.
        has_cores: Whether the folder is a LoRA-Over checkpoint.
        served: The base model.
        model: Base model that the user named.
        written: Folder of the conversion that is to be exported; None if the adapter itself is.
    """

    path: Path
    config: Mapping[str, Any]
    fields: AdapterConfig | None
    shapes: Mapping[str, tuple[int, ...]]
    lora: AdapterDir | None
    unreadable: str | None
    has_cores: bool
    served: ServedModel
    model: str | None
    written: Path | None = None

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """Every A and B by its key, whether or not the key has PEFT's prefix."""
        found = {}
        for key, shape in self.shapes.items():
            match = _MATRIX.fullmatch(key)
            if match is not None:
                is_embedding = match["kind"] != "lora_"
                found[key] = Matrix(match["module"], match["side"], is_embedding, key.startswith(KEY_PREFIX), shape)
        return found

    @property
    def modules(self) -> list[str]:
        """Paths of the adapted modules, each once."""
        return list(dict.fromkeys(matrix.module for matrix in self.matrices.values()))

    @property
    def ranks(self) -> list[int]:
        """Ranks of the A matrices, each once, in ascending order."""
        found = self.matrices.values()
        return sorted({matrix.shape[0] for matrix in found if matrix.side == "A" and len(matrix.shape) == 2})


def read_subject(request: CheckRequest) -> Subject:
    """Read an adapter's configuration and tensor layout, and the configuration of its base model.

    Raises:
        CheckpointError: No adapter, or files that cannot be read.
        ConfigError: No base model, or one that transformers cannot build.
    """
    path, model = request.adapter, request.model
    if kind_of(path) != "folder":
        raise CheckpointError(f"{path}: no such folder; expected a PEFT adapter directory.")
    config = read_json(path / CONFIG_FILE, _AnyConfig)
    with open_tensors(path / TENSORS_FILE) as file:
        shapes = {key: file.shape(key) for key in file.keys}
    named = model or config.base_model_name_or_path
    if named is None:
        raise ConfigError(f"{path}: names no base model; name the base model with {request.named('model')}.")
    revision = config.revision if named == config.base_model_name_or_path else None
    if model is None and is_elsewhere(named):
        raise ConfigError(
            f"{path}: names the base model {named}, an address that is read only if you name it yourself; use "
            f"{request.named('model', named)} if you trust it."
        )
    source = resolve_model(named, revision, with_weights=False, say=request.report.line)
    served = read_served(source)
    lora, unreadable = _read_lora(path, has_cores := (path / META_FILE).exists(), served)
    return Subject(
        path=path,
        config=config.model_dump(),
        fields=read_json(path / CONFIG_FILE, AdapterConfig) if config.peft_type == "LORA" else None,
        shapes=shapes if lora is None or not lora.stacks else lora.shapes,
        lora=lora,
        unreadable=unreadable,
        has_cores=has_cores,
        served=served,
        model=model,
    )


def _read_lora(path: Path, has_cores: bool, served: ServedModel) -> tuple[AdapterDir | None, str | None]:
    """Read the adapter as the exports do; a checkpoint that contradicts itself is an error here as well."""
    try:
        return read_on_base(read_source(path), served.experts), None
    except CheckpointError as error:
        if has_cores:
            raise
        return None, str(error)
