"""Model classes of vLLM that take LoRA adapters: `architectures.json`, made by `make vllm-architectures`."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from pydantic import BaseModel, ConfigDict


class Architecture(BaseModel):
    """What decides which modules of a class can be adapted.

    Args:
        embeddings: names of embeddings and heads that take LoRA.
        packed: modules that vLLM fuses, with the names that adapters use for their parts.
        multimodal: only the language model is adapted, unless the server is told otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    embeddings: tuple[str, ...]
    packed: dict[str, tuple[str, ...]]
    multimodal: bool


class Architectures(BaseModel):
    """Contents of `architectures.json`.

    Args:
        version: of vLLM.
        without_lora: classes that vLLM serves without adapters only.
        unknown: classes that could not be looked at.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    version: str
    without_lora: tuple[str, ...]
    unknown: tuple[str, ...]
    lora: dict[str, Architecture]


@cache
def known_architectures() -> Architectures:
    """The table that comes with this package."""
    return Architectures.model_validate_json(files("loraover_export.vllm").joinpath("architectures.json").read_bytes())
