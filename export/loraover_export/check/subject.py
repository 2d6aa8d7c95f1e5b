"""An adapter of any PEFT method and its base model, read without a verdict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loraover.checkpoint.adapter_config import AdapterConfig
from loraover.checkpoint.model_facts import ServedModel
from loraover.checkpoint.peft_adapter import KEY_PREFIX, AdapterDir

_MATRIX = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.(?P<kind>lora_(?:embedding_)?)(?P<side>[AB])(?:\.weight)?"
)


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
    """An adapter that is checked, and the model under it.

    Args:
        path: Folder of the adapter.
        config: Contents of `adapter_config.json`.
        fields: The fields of the configuration that give rank and scaling; None for other methods than LoRA.
        shapes: Shape of every tensor in the file, by key; of each expert's A and B where the file stacks them.
        lora: The adapter, if it is a plain LoRA that the exports can read.
        unreadable: Reason for which the exports cannot read it; None if they can.
        not_finite: Tensor that holds NaN or infinity, in words; None if there is none.
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
    not_finite: str | None
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
