"""Facts of a model from `config.json` and the headers of its weights, for where PyTorch is not installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from loraover.checkpoint.model_facts import CONFIG, ModelFacts, ModuleFacts
from loraover.checkpoint.tensor_file import open_tensors
from loraover.common.errors import CheckpointError, ConfigError
from loraover.common.extras import install
from loraover.common.strict_json import read_json
from loraover.models.load import ModelSource
from loraover.sources.hub import http_errors

FAMILIES = (
    *("cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4"),
    *("granite", "helium", "lfm2", "llama", "mistral", "nemotron", "olmo", "olmo2"),
    *("phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"),
)
"""Types of decoders, by transformers' names, whose files name every matrix as transformers names its module."""
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class _Config(BaseModel):
    model_config = ConfigDict(extra="allow")

    model_type: str
    architectures: list[str] = Field(min_length=1)
    vocab_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    tie_word_embeddings: bool | None = None
    quantization_config: dict[str, Any] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None  # what transformers before 5 writes


class ShardIndex(BaseModel):
    """Contents of the index of several shards: the file of each tensor."""

    weight_map: dict[str, str] = Field(min_length=1)


def facts_of_headers(source: ModelSource, config_file: Path | None) -> ModelFacts:
    """Read what `read_facts` finds by building the model, for a decoder of `FAMILIES` that is not quantised.

    A module without a matrix is of the kind "other", and modules without parameters are not listed.

    Raises:
        ConfigError: Another model, no usable configuration, or headers that cannot be read.
    """
    if config_file is None:
        raise ConfigError(f"model: {source.origin} has no {CONFIG}; name a model that transformers saved.")
    try:
        config = read_json(config_file, _Config)
    except CheckpointError as error:
        raise ConfigError(f"model: {source.origin} has no usable {CONFIG}: {error}") from error
    architecture = config.architectures[0]
    is_known = config.model_type in FAMILIES and architecture.endswith("ForCausalLM")
    if not is_known or config.quantization_config is not None:
        kind = architecture if config.quantization_config is None else f"quantised {architecture}"
        raise _needs_torch(source, f"transformers alone knows the modules of a {kind}")
    try:
        shapes = _shapes(source, config_file.parent)
    except (CheckpointError, OSError) as error:
        raise _needs_torch(source, f"the headers of its weights cannot be read ({error})") from error
    if f"{EMBEDDING}.weight" not in shapes:
        raise _needs_torch(source, f"its files hold no {EMBEDDING}, so transformers alone knows their names")
    is_tied = config.tie_word_embeddings
    is_tied = f"{HEAD}.weight" not in shapes if is_tied is None else is_tied
    return ModelFacts(
        architecture=architecture,
        model_type=config.model_type,
        dtype=config.dtype or config.torch_dtype,
        vocabulary=config.vocab_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads or config.num_attention_heads,
        is_causal=True,
        is_encoder_decoder=False,
        is_tied=is_tied,
        quantization=None,
        modules=_modules(shapes, is_tied),
        experts={},
        parameters=tuple({**shapes, f"{HEAD}.weight": ()} if is_tied else shapes),
    )


def _needs_torch(source: ModelSource, why: str) -> ConfigError:
    return ConfigError(f"model: {source.origin}: {why}: {install('torch')}")


def _shapes(source: ModelSource, folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight, from files that are here or from the first bytes of those on the hub."""
    single, index = folder / SINGLE, folder / INDEX  # transformers takes the first where both are there
    has_shards = index.is_file() and not single.is_file()
    names = set(read_json(index, ShardIndex).weight_map.values()) if has_shards else {SINGLE}
    found: dict[str, tuple[int, ...]] = {}
    if not Path(source.location).is_dir() and not all((folder / name).is_file() for name in names):
        import huggingface_hub
        from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

        try:
            hub = huggingface_hub.get_safetensors_metadata(source.location, revision=source.revision)
        except (OSError, *http_errors(), NotASafetensorsRepoError, SafetensorsParsingError) as error:
            raise CheckpointError(str(error)) from error
        files = hub.files_metadata.values()
        return {key: tuple(tensor.shape) for file in files for key, tensor in file.tensors.items()}
    for name in sorted(names):
        with open_tensors(folder / name) as opened:
            found |= {key: opened.shape(key) for key in opened.keys}
    return found


def _modules(shapes: Mapping[str, tuple[int, ...]], is_tied: bool) -> dict[str, ModuleFacts]:
    found: dict[str, ModuleFacts] = {}
    for key, shape in shapes.items():
        path, _, parameter = key.rpartition(".")
        parts = path.split(".")
        for count in range(1, len(parts) + 1):
            found.setdefault(".".join(parts[:count]), ModuleFacts("other", "module without a matrix"))
        if parameter == "weight" and len(shape) == 2:
            found[path] = _matrix(path, (shape[0], shape[1]))
    weight = found[EMBEDDING].weight
    if is_tied and weight is not None:
        found.setdefault(HEAD, _matrix(HEAD, weight))
    return found


def _matrix(path: str, shape: tuple[int, int]) -> ModuleFacts:
    """Describe the embedding, or a linear layer, whose weight is (out_features, in_features)."""
    if path == EMBEDDING:
        return ModuleFacts("embedding", "Embedding", shape, shape)
    return ModuleFacts("linear", "Linear", (shape[1], shape[0]), shape)
