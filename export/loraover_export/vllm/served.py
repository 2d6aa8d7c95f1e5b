"""Names and shapes of the served model's modules, from `config.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from loraover.models.load import ModelSource, load_config, load_skeleton


@dataclass(frozen=True)
class ServedModule:
    """One module of the served model.

    Args:
        kind: kind of layer that PEFT and vLLM would adapt it as.
        type_name: name of its class.
        shape: (in_features, out_features), or (vocabulary, embedding dimension); None for other kinds.
    """

    kind: Literal["linear", "embedding", "other"]
    type_name: str
    shape: tuple[int, int] | None = None


@dataclass(frozen=True)
class ServedModel:
    """The model that adapters are to be served on.

    Args:
        source: where the model is read from.
        architecture: name of the model class that vLLM looks up.
        dtype: data type that the configuration gives, such as "bfloat16"; None if it gives none.
        vocabulary: number of tokens; None if the configuration gives none.
        modules: modules by path; empty if vLLM serves no adapters on this architecture.
    """

    source: ModelSource
    architecture: str
    dtype: str | None
    vocabulary: int | None
    modules: Mapping[str, ServedModule] = field(default_factory=dict)


def read_served(source: ModelSource, supported: Mapping[str, Any] | None = None) -> ServedModel:
    """Read a model's configuration, and build its modules without weights if the architecture is supported.

    Args:
        source: where the model is read from.
        supported: classes that take adapters, by name; None means all classes.

    Raises:
        ConfigError: no usable configuration, or a class that transformers cannot build.
    """
    config = load_config(source)
    text = config.get_text_config()
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    architecture = config.architectures[0]
    modules = {}
    if supported is None or architecture in supported:
        modules = {name: _describe(module) for name, module in load_skeleton(source).named_modules() if name}
    return ServedModel(
        source=source,
        architecture=architecture,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        vocabulary=getattr(text, "vocab_size", None),
        modules=modules,
    )


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
