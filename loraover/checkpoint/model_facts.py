"""Facts about a model, from its configuration and the names and shapes of its modules.

They are read from the headers of the model's weights where its kind is known, and else by transformers, which takes
PyTorch and seconds. What was found is kept in a file, by a digest of the configuration and of the versions that read
it. Who reads it again imports neither.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from loraover.checkpoint.expert_stacks import ExpertWeight, find_expert_weights
from loraover.checkpoint.tensor_file import FLOATS, open_tensors
from loraover.common.atomic_output import publish_file
from loraover.common.errors import CheckpointError, ConfigError, OutputError
from loraover.common.extras import install
from loraover.common.later import has_torch
from loraover.common.paths import cache_folder
from loraover.common.provenance import environment
from loraover.common.strict_json import read_json
from loraover.models.load import ModelSource, load_config, load_skeleton
from loraover.models.model_file import find_model_file
from loraover.sources.hub import http_errors

if TYPE_CHECKING:
    from loraover.models.load import ModelSource

CONFIG = "config.json"

FORM = 4
"""Number of the form of kept facts; another form gets other files."""

KEPT_IN_MEMORY = 32

FAMILIES = (
    *("cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4"),
    *("granite", "helium", "lfm2", "llama", "mistral", "nemotron", "olmo", "olmo2"),
    *("phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"),
)
"""Types of decoders, by transformers' names, whose files name every matrix as transformers names its module."""

EMBEDDING, LAYERS, HEAD = "model.embed_tokens", "model.layers.", "lm_head"

KNOWN = re.compile(r"(model\.(embed_tokens|\w*norm|layers\.\d+\..+)|lm_head)\.(weight|bias)")
"""Names of the tensors of those decoders."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class ModuleFacts:
    """Module of a model.

    Args:
        kind: Kind of layer that PEFT and vLLM would adapt it as. One expert's part of a parameter is an "expert".
        type_name: Name of its class.
        shape: (in_features, out_features), or (vocabulary, embedding dimension); None for other kinds.
        weight: Shape of its weight as it is stored, if that is a matrix; else None.
    """

    kind: Literal["linear", "embedding", "expert", "other"]
    type_name: str
    shape: tuple[int, int] | None = None
    weight: tuple[int, int] | None = None


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model from its configuration.

    Args:
        architecture: Name of its class in transformers.
        model_type: transformers' name of its kind, such as "llama".
        dtype: Data type that the configuration gives, such as "bfloat16"; None if it gives none.
        vocabulary: Number of tokens; None if the configuration gives none.
        layers: Number of layers; None if the configuration gives none.
        heads: Number of heads of the queries; None if the configuration gives none.
        key_value_heads: Number of heads of the keys and values; None if the configuration gives none.
        is_causal: Whether it is a causal language model.
        is_encoder_decoder: Whether it has an encoder and a decoder, as T5 has.
        is_tied: Whether the head is the embedding.
        quantization: Method by which the weights are quantised; None if they are not.
        modules: Modules by path, without the parts of parameters that hold experts; empty if they were not asked for.
        experts: Parameters of the experts, by path.
        parameters: Names of all parameters; empty if modules were not asked for.
    """

    architecture: str
    model_type: str
    dtype: str | None
    vocabulary: int | None
    layers: int | None
    heads: int | None
    key_value_heads: int | None
    is_causal: bool
    is_encoder_decoder: bool
    is_tied: bool
    quantization: str | None
    modules: dict[str, ModuleFacts]
    experts: dict[str, ExpertWeight]
    parameters: tuple[str, ...]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shape (out_features, in_features) of each linear layer, (tokens, dimension) of each embedding.

        transformers' Conv1D, which keeps its weight transposed, counts as a linear layer.
        """
        found = {}
        for path, module in self.modules.items():
            if module.weight is not None and module.type_name == "Conv1D":
                found[path] = module.weight[::-1]
            elif module.weight is not None and module.kind in ("linear", "embedding"):
                found[path] = module.weight
        return found


@dataclass(frozen=True)
class ServedModel(ModelFacts):
    """Facts from the configuration of the model that an adapter is exported for, or served on.

    Its modules have each expert's part of a parameter too, like "model.layers.0.mlp.experts.3.down_proj". There are
    none if the engine takes no adapters for this architecture.

    Args:
        source: Where the model is read from.
    """

    source: ModelSource


_FACTS = TypeAdapter(ModelFacts)


def read_served(source: ModelSource, supported: Container[str] | None = None) -> ServedModel:
    """Read a model's configuration, and its modules if its class is among the `supported` ones; None supports all.

    Raises:
        ConfigError: No usable configuration, or a class that transformers cannot build.
    """
    facts = read_facts(source, supported)
    modules: dict[str, ModuleFacts] = {}
    if supported is None or facts.architecture in supported:
        modules |= facts.modules
        for path, weight in facts.experts.items():
            owner, _, parameter = path.rpartition(".")
            described = ModuleFacts("expert", "part of a parameter", weight.shape[::-1])
            modules |= {f"{owner}.{index}.{parameter}": described for index in range(weight.experts)}
    return ServedModel(**vars(facts) | {"modules": modules}, source=source)


def read_facts(source: ModelSource, wanted: Container[str] | None = None) -> ModelFacts:
    """Read a model's configuration and the headers of its weights, or build it without weights.

    Headers are read if the files are here. What an earlier call built is read again.

    Only modules of the `wanted` classes are built; None wants all.

    Raises:
        ConfigError: No usable configuration, or a class that transformers cannot build.
    """
    config = find_model_file(source, CONFIG)
    if config is None:
        return _found(source, wanted)
    if has_torch() and has_weights(source, config.parent):
        with suppress(ConfigError):  # transformers builds all other models
            return facts_of_headers(source, config)
    content = config.read_bytes()
    versions = [environment().get(package) for package in ("torch", "transformers")] if has_torch() else None
    key = hashlib.sha256(repr([FORM, versions, content]).encode()).hexdigest()
    file = cache_folder() / "models" / f"{key}.json"
    facts = _read(file) if file.is_file() else None
    if facts is None:
        facts = _found(source, wanted)
        if facts.modules:
            with suppress(OutputError):  # without a cache, it takes seconds each time
                publish_file(file, lambda path: path.write_bytes(_FACTS.dump_json(facts)), parents=True)
    return facts


@lru_cache(KEPT_IN_MEMORY)
def _read(file: Path) -> ModelFacts | None:
    """Return kept facts; None if the file is not what was written."""
    try:
        return _FACTS.validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def _found(source: ModelSource, wanted: Container[str] | None) -> ModelFacts:
    if has_torch():
        return facts_of_class(source, wanted)
    return facts_of_headers(source, find_model_file(source, CONFIG))


def facts_of_class(source: ModelSource, wanted: Container[str] | None = None) -> ModelFacts:
    """Find what `read_facts` returns by building the model without weights, of any class that transformers has."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = load_config(source)
    text = config.get_text_config()
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    architecture = config.architectures[0]
    found = getattr(text, "tie_word_embeddings", None)  # which some multimodal models say as a whole only
    is_tied = bool(getattr(config, "tie_word_embeddings", False) if found is None else found)
    modules, experts, parameters = {}, {}, ()
    if wanted is None or architecture in wanted:
        model = load_skeleton(source)
        with suppress(NotImplementedError):  # some models have several embeddings
            ends = [
                getattr(end, "weight", None) for end in (model.get_input_embeddings(), model.get_output_embeddings())
            ]
            if all(
                weight is not None for weight in ends
            ):  # transformers ties LLaVA's where either configuration says so
                is_tied = ends[0] is ends[1]
        experts = find_expert_weights(model)
        modules = {name: _describe(module) for name, module in model.named_modules() if name}
        parameters = tuple(name for name, _ in model.named_parameters(remove_duplicate=False))
    quantization, method = getattr(config, "quantization_config", None), None
    if quantization is not None:
        fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
        method = str(fields.get("quant_method", "an unnamed method"))
    return ModelFacts(
        architecture=architecture,
        model_type=config.model_type,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        vocabulary=_number(text, "vocab_size"),
        layers=_number(text, "num_hidden_layers"),
        heads=_number(text, "num_attention_heads"),
        key_value_heads=_number(text, "num_key_value_heads"),
        is_causal=architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        is_encoder_decoder=bool(config.is_encoder_decoder),
        is_tied=is_tied,
        quantization=method,
        modules=modules,
        experts=experts,
        parameters=parameters,
    )


def _number(config: Any, name: str) -> int | None:
    """Return a field that most configurations have; None where it has another number for each layer."""
    found = getattr(config, name, None)
    return found if isinstance(found, int) else None


def _describe(module: Any) -> ModuleFacts:
    from torch import Tensor, nn

    name, weight = type(module).__name__, getattr(module, "weight", None)
    matrix = (weight.shape[0], weight.shape[1]) if isinstance(weight, Tensor) and weight.ndim == 2 else None
    match module:
        case nn.Linear():
            return ModuleFacts("linear", name, (module.in_features, module.out_features), matrix)
        case nn.Embedding():
            return ModuleFacts("embedding", name, (module.num_embeddings, module.embedding_dim), matrix)
        case _:
            return ModuleFacts("other", name, None, matrix)


class _Config(BaseModel):
    model_config = ConfigDict(extra="allow")

    model_type: str
    architectures: list[str] = Field(min_length=1)
    vocab_size: int | None = None
    hidden_size: int | None = None
    layer_types: list[str] | None = None
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
    """
    if config_file is None:
        raise ConfigError(f"model: {source.origin} has no {CONFIG}; name a model that transformers saved.")
    try:
        config = read_json(config_file, _Config)
    except CheckpointError as error:
        raise ConfigError(f"model: {source.origin} has no usable {CONFIG}: {error}") from error
    architecture, family = config.architectures[0], config.model_type
    is_known = family in FAMILIES and architecture.lower() == f"{family.removesuffix('_text')}forcausallm"
    if not is_known or config.quantization_config is not None:
        kind = architecture if config.quantization_config is None else f"quantised {architecture}"
        raise _needs_torch(source, f"transformers alone knows the modules of a {kind}")
    try:
        shapes = _shapes(source, config_file.parent)
    except (CheckpointError, OSError) as error:
        raise _needs_torch(source, f"the headers of its weights cannot be read ({error})") from error
    is_tied = config.tie_word_embeddings
    is_tied = f"{HEAD}.weight" not in shapes if is_tied is None else is_tied
    contradiction = next(_contradictions(config, shapes, is_tied), None)
    if contradiction is not None:
        raise _needs_torch(source, f"{contradiction}, so transformers alone knows its modules")
    return ModelFacts(
        architecture=architecture,
        model_type=family,
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


def _contradictions(config: _Config, shapes: Mapping[str, tuple[int, ...]], is_tied: bool) -> Iterator[str]:
    """Yield why the tensors of some files are not those that the class of a configuration has."""
    stray = next((key for key in shapes if not KNOWN.fullmatch(key)), None)
    if stray is not None:
        yield f"its files hold {stray}"
    if shapes.get(f"{EMBEDDING}.weight") != (config.vocab_size, config.hidden_size):
        yield f"its files hold no {EMBEDDING} of vocab_size rows and hidden_size columns"
    has_head = f"{HEAD}.weight" in shapes
    if not (has_head or is_tied) or (has_head and config.tie_word_embeddings is None):
        yield f"its files and {CONFIG} do not tell whether the head is the embedding"
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for key in (key for key in shapes if key.startswith(LAYERS)):
        number, _, path = key.removeprefix(LAYERS).partition(".")
        layers.setdefault(number, {})[path] = shapes[key]
    count = config.num_hidden_layers or 0
    if layers.keys() != {str(number) for number in range(count)}:
        yield f"its files hold {len(layers)} layers, and {CONFIG} says {config.num_hidden_layers}"
        return
    kinds = config.layer_types if len(config.layer_types or ()) == count else None
    first: dict[str, dict[str, tuple[int, ...]]] = {}
    for index in range(count):
        kind = "" if kinds is None else kinds[index]
        if first.setdefault(kind, layers[str(index)]) != layers[str(index)]:
            yield f"its layer {index} has other tensors than the layers before"


def _needs_torch(source: ModelSource, why: str) -> ConfigError:
    return ConfigError(f"model: {source.origin}: {why}: {install('torch')}")


def has_weights(source: ModelSource, folder: Path) -> bool:
    """Whether the files of a model's weights are here, beside its configuration in a folder."""
    try:
        return Path(source.location).is_dir() or all((folder / name).is_file() for name in _files_in(folder))
    except CheckpointError:
        return False


def _files_in(folder: Path) -> set[str]:
    single, index = folder / SINGLE, folder / INDEX  # transformers takes the first where both are there
    has_shards = index.is_file() and not single.is_file()
    return set(read_json(index, ShardIndex).weight_map.values()) if has_shards else {SINGLE}


def _shapes(source: ModelSource, folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight, from files that are here or from the first bytes of those on the hub."""
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    if has_weights(source, folder):
        for name in sorted(_files_in(folder)):
            with open_tensors(folder / name) as opened:
                entries += [(key, opened.dtype(key), opened.shape(key)) for key in opened.keys]
    else:
        entries += _on_the_hub(source)
    coarse = next((key for key, dtype, _ in entries if dtype not in FLOATS), None)
    if coarse is not None:
        raise CheckpointError(f"{coarse} holds no floating-point numbers")
    return {key: shape for key, _, shape in entries}


def _on_the_hub(source: ModelSource) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield name, data type and shape of each tensor."""
    import huggingface_hub
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        hub = huggingface_hub.get_safetensors_metadata(source.location, revision=source.revision)
    except (OSError, *http_errors(), NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise CheckpointError(str(error)) from error
    for file in hub.files_metadata.values():
        yield from ((key, str(tensor.dtype), tuple(tensor.shape)) for key, tensor in file.tensors.items())


def _modules(shapes: Mapping[str, tuple[int, ...]], is_tied: bool) -> dict[str, ModuleFacts]:
    found: dict[str, ModuleFacts] = {}
    for key, shape in shapes.items():
        path, _, parameter = key.rpartition(".")
        parts = path.split(".")
        for count in range(1, len(parts) + 1):
            found.setdefault(".".join(parts[:count]), ModuleFacts("other", "module without a matrix"))
        if parameter == "weight" and len(shape) == 2 and not path.endswith("norm"):
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
