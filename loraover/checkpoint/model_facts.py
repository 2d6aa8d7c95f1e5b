"""Facts about a model, from its configuration and the names and shapes of its modules; `read_facts.py` reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loraover.checkpoint.expert_stacks import ExpertWeight

if TYPE_CHECKING:
    from loraover.models.load import ModelSource


CONFIG = "config.json"


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
