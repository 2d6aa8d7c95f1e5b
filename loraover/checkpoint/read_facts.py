"""Names and shapes of a model's modules, from `config.json` alone; without PyTorch, from the weights' headers too.

To find them takes PyTorch, transformers and seconds, so they are kept in a file, by a digest of the configuration and
of the versions that read it. Who reads them again imports neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from loraover.checkpoint.expert_stacks import find_expert_weights
from loraover.checkpoint.model_facts import CONFIG, ModelFacts, ModuleFacts
from loraover.common.atomic_output import publish_file
from loraover.common.errors import OutputError
from loraover.common.later import has_torch
from loraover.common.paths import cache_folder
from loraover.common.provenance import environment
from loraover.models.load import load_config, load_skeleton
from loraover.models.model_file import find_model_file

if TYPE_CHECKING:
    from loraover.models.load import ModelSource

FORM = 3
"""Number of the form of kept facts; another form gets other files."""
KEPT_IN_MEMORY = 32

_FACTS = TypeAdapter(ModelFacts)


def read_facts(source: ModelSource, wanted: Container[str] | None = None) -> ModelFacts:
    """Read a model's configuration, and build its modules without weights, or read what an earlier call found.

    Args:
        source: Where the model is read from.
        wanted: Classes whose modules are looked at; None means all.

    Raises:
        ConfigError: No usable configuration, or a class that transformers cannot build.
    """
    config = find_model_file(source, CONFIG)
    if config is None:
        return _found(source, wanted)
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
    if not has_torch():
        from loraover.checkpoint.header_facts import facts_of_headers

        return facts_of_headers(source, find_model_file(source, CONFIG))
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = load_config(source)
    text = config.get_text_config()
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    architecture = config.architectures[0]
    modules, experts, parameters = {}, {}, ()
    if wanted is None or architecture in wanted:
        model = load_skeleton(source)
        experts = find_expert_weights(model)
        modules = {name: _describe(module) for name, module in model.named_modules() if name}
        parameters = tuple(name for name, _ in model.named_parameters(remove_duplicate=False))
    quantization = getattr(config, "quantization_config", None)
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
        is_tied=_is_tied(config, text),
        quantization=None if quantization is None else _method(quantization),
        modules=modules,
        experts=experts,
        parameters=parameters,
    )


def _number(config: Any, name: str) -> int | None:
    """Return a field that most configurations have; None of one that has another number for each layer."""
    found = getattr(config, name, None)
    return found if isinstance(found, int) else None


def _is_tied(config: Any, text: Any) -> bool:
    """Whether the head is the embedding, which some multimodal models say in the whole configuration only."""
    found = getattr(text, "tie_word_embeddings", None)
    return bool(getattr(config, "tie_word_embeddings", False) if found is None else found)


def _method(quantization: Any) -> str:
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    return str(fields.get("quant_method", "an unnamed method"))


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
