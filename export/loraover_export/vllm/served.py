"""Names and shapes of the served model's modules, from `config.json` alone.

To find them takes PyTorch, transformers and seconds, so they are kept in a file, by a digest of the configuration and
of the versions that read it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from loraover.checkpoint.expert_stacks import ExpertWeight, find_expert_weights
from loraover.common.atomic_output import publish_file
from loraover.common.errors import OutputError
from loraover.common.paths import cache_folder
from loraover.models.load import load_config, load_skeleton

if TYPE_CHECKING:
    from loraover.models.load import ModelSource

CONFIG = "config.json"
FORM = 1
"""Number of the form of kept facts; another form gets other files."""
KEPT_IN_MEMORY = 32


@dataclass(frozen=True)
class ServedModule:
    """One module of the served model.

    Args:
        kind: Kind of layer that PEFT and vLLM would adapt it as. One expert's part of a parameter is an "expert".
        type_name: Name of its class.
        shape: (in_features, out_features), or (vocabulary, embedding dimension); None for other kinds.
    """

    kind: Literal["linear", "embedding", "expert", "other"]
    type_name: str
    shape: tuple[int, int] | None = None


@dataclass(frozen=True)
class Facts:
    """What a configuration says of a model.

    Args:
        architecture: Name of the model class that vLLM looks up.
        dtype: Data type that the configuration gives, such as "bfloat16"; None if it gives none.
        vocabulary: Number of tokens; None if the configuration gives none.
        is_causal: Whether it is a causal language model.
        is_tied: Whether the head is the embedding.
        quantization: Method by which the weights are quantised; None if they are not.
        modules: Modules by path, without the parts of parameters that hold experts; empty if they were not asked for.
        experts: Parameters of the experts, by path.
    """

    architecture: str
    dtype: str | None
    vocabulary: int | None
    is_causal: bool
    is_tied: bool
    quantization: str | None
    modules: dict[str, ServedModule]
    experts: dict[str, ExpertWeight]


_FACTS = TypeAdapter(Facts)


@dataclass(frozen=True)
class ServedModel:
    """The model that adapters are to be served on.

    Args:
        source: Where the model is read from.
        facts: What its configuration says.
        modules: Modules by path, and experts like "model.layers.0.mlp.experts.3.down_proj"; empty if vLLM serves no
            adapters on this architecture.
    """

    source: ModelSource
    facts: Facts
    modules: Mapping[str, ServedModule] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """Name of the model class that vLLM looks up."""
        return self.facts.architecture

    @property
    def dtype(self) -> str | None:
        """Data type that the configuration gives, such as "bfloat16"; None if it gives none."""
        return self.facts.dtype

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens; None if the configuration gives none."""
        return self.facts.vocabulary

    @property
    def experts(self) -> Mapping[str, ExpertWeight]:
        """Parameters of the model's experts, by path."""
        return self.facts.experts


def read_served(source: ModelSource, supported: Mapping[str, Any] | None = None) -> ServedModel:
    """Read a model's configuration, and build its modules without weights if the architecture is supported.

    Args:
        source: Where the model is read from.
        supported: Classes that take adapters, by name; None means all classes.

    Raises:
        ConfigError: No usable configuration, or a class that transformers cannot build.
    """
    facts = _kept(source, supported) or _found(source, supported)
    if supported is not None and facts.architecture not in supported:
        return ServedModel(source, facts)
    return ServedModel(source, facts, facts.modules | _parts(facts.experts))


def _kept(source: ModelSource, supported: Mapping[str, Any] | None) -> Facts | None:
    """Return the facts of a model from the cache, after finding them if need be; None if it has no configuration."""
    config = _config_file(source)
    if config is None:
        return None
    content = config.read_bytes()
    versions = [version(package) for package in ("torch", "transformers")]
    key = hashlib.sha256(repr([FORM, versions, content]).encode()).hexdigest()
    file = cache_folder() / "models" / f"{key}.json"
    facts = _read(file) if file.is_file() else None
    if facts is None:
        facts = _found(source, supported)
        if facts.modules:
            with suppress(OutputError):  # without a cache, it takes seconds each time
                publish_file(file, lambda path: path.write_bytes(_FACTS.dump_json(facts)), parents=True)
    return facts


@lru_cache(KEPT_IN_MEMORY)
def _read(file: Path) -> Facts | None:
    """Return kept facts; None if the file is not what was written."""
    try:
        return _FACTS.validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def _config_file(source: ModelSource) -> Path | None:
    """Return the file of a model's configuration; None if it has none."""
    folder = Path(source.location)
    if folder.is_dir():
        return folder / CONFIG if (folder / CONFIG).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.location, CONFIG, revision=source.revision)
    return Path(found) if isinstance(found, str) else None


def _found(source: ModelSource, supported: Mapping[str, Any] | None) -> Facts:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = load_config(source)
    text = config.get_text_config()
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    architecture = config.architectures[0]
    modules, experts = {}, {}
    if supported is None or architecture in supported:
        model = load_skeleton(source)
        experts = find_expert_weights(model)
        modules = {name: _describe(module) for name, module in model.named_modules() if name}
    quantization = getattr(config, "quantization_config", None)
    return Facts(
        architecture=architecture,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        vocabulary=getattr(text, "vocab_size", None),
        is_causal=architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        is_tied=bool(text.tie_word_embeddings),
        quantization=None if quantization is None else _method(quantization),
        modules=modules,
        experts=experts,
    )


def _method(quantization: Any) -> str:
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    return str(fields.get("quant_method", "an unnamed method"))


def _parts(experts: Mapping[str, ExpertWeight]) -> dict[str, ServedModule]:
    """Return the matrices of the experts as if each were a module, by path."""
    found: dict[str, ServedModule] = {}
    for path, weight in experts.items():
        owner, _, parameter = path.rpartition(".")
        described = ServedModule("expert", "part of a parameter", weight.shape[::-1])
        found |= {f"{owner}.{index}.{parameter}": described for index in range(weight.experts)}
    return found


def _describe(module: Any) -> ServedModule:
    from torch import nn

    name = type(module).__name__
    match module:
        case nn.Linear():
            return ServedModule("linear", name, (module.in_features, module.out_features))
        case nn.Embedding():
            return ServedModule("embedding", name, (module.num_embeddings, module.embedding_dim))
        case _:
            return ServedModule("other", name)
