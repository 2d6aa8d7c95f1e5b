"""Names and shapes of the served model's modules, from `config.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from loraover.checkpoint.expert_stacks import ExpertWeight, find_expert_weights
from loraover.models.load import ModelSource, load_config, load_skeleton


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
class ServedModel:
    """The model that adapters are to be served on.

    Args:
        source: Where the model is read from.
        architecture: Name of the model class that vLLM looks up.
        dtype: Data type that the configuration gives, such as "bfloat16"; None if it gives none.
        vocabulary: Number of tokens; None if the configuration gives none.
        experts: Parameters of its experts, by path.
        modules: Modules by path, and experts like "model.layers.0.mlp.experts.3.down_proj"; empty if vLLM serves no
            adapters on this architecture.
    """

    source: ModelSource
    architecture: str
    dtype: str | None
    vocabulary: int | None
    modules: Mapping[str, ServedModule] = field(default_factory=dict)
    experts: Mapping[str, ExpertWeight] = field(default_factory=dict)


def read_served(source: ModelSource, supported: Mapping[str, Any] | None = None) -> ServedModel:
    """Read a model's configuration, and build its modules without weights if the architecture is supported.

    Args:
        source: Where the model is read from.
        supported: Classes that take adapters, by name; None means all classes.

    Raises:
        ConfigError: No usable configuration, or a class that transformers cannot build.
    """
    config = load_config(source)
    text = config.get_text_config()
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    architecture = config.architectures[0]
    modules, experts = {}, {}
    if supported is None or architecture in supported:
        model = load_skeleton(source)
        experts = find_expert_weights(model)
        modules = {name: _describe(module) for name, module in model.named_modules() if name}
        for path, weight in experts.items():
            owner, _, parameter = path.rpartition(".")
            described = ServedModule("expert", "part of a parameter", weight.shape[::-1])
            modules |= {f"{owner}.{index}.{parameter}": described for index in range(weight.experts)}
    return ServedModel(
        source=source,
        architecture=architecture,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        vocabulary=getattr(text, "vocab_size", None),
        modules=modules,
        experts=experts,
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
