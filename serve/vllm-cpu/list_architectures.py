"""Which of vLLM's model classes take LoRA adapters, as JSON on standard output.

Run by the Python of an environment that holds vLLM (`make vllm-architectures`); nothing is built or downloaded.
"""

from __future__ import annotations

import json
import sys
from unittest.mock import MagicMock

import vllm
from vllm.config.model import try_match_architecture_defaults
from vllm.model_executor.models.interfaces import supports_lora, supports_multimodal
from vllm.model_executor.models.interfaces_base import is_pooling_model, is_text_generation_model
from vllm.model_executor.models.registry import _SPECULATIVE_DECODING_MODELS, ModelRegistry


def describe(name: str, cls: type) -> dict[str, object]:
    """Attributes that decide which adapters a class takes, and their type; see vllm/lora/model_manager.py."""
    return {
        "embeddings": sorted(cls.embedding_modules),
        "packed": {name: list(parts) for name, parts in cls.packed_modules_mapping.items()},
        "language_model": language_model(cls),
        "towers": towers(cls),
        "stacked_experts": bool(cls.is_3d_moe_weight),
        "pooling": is_pooled(name, cls),
        "renames": renames(cls),
    }


def is_pooled(name: str, cls: type) -> bool:
    """Whether `vllm serve` runs a class to pool, and not to generate; see ModelConfig._get_default_runner_type."""
    if is_pooling_model(cls) or is_text_generation_model(cls):
        return bool(is_pooling_model(cls))
    found = try_match_architecture_defaults(name)
    return found is not None and found[1][0] == "pooling"


def language_model(cls: type) -> str | None:
    """The start of the names of the modules that adapters change, where not all modules are.

    get_mm_mapping is asked without a model: some classes look at which towers they have, but the language model's
    name does not depend on that.
    """
    if not (supports_multimodal(cls) and hasattr(cls, "get_mm_mapping")):
        return None
    (prefix,) = cls.get_mm_mapping(MagicMock()).language_model
    return str(prefix)


def towers(cls: type) -> list[str]:
    """The starts of the names of the modules that adapters change with --enable-tower-connector-lora, too."""
    if language_model(cls) is None or not cls.supports_tower_connector_lora:
        return []
    found = cls.get_mm_mapping(MagicMock())
    return [*found.tower_model, *found.connector]


def renames(cls: type) -> list[tuple[str, str, str]]:
    """Changes that vLLM makes to the names in an adapter's file, in its order; see WeightsMapper._map_name."""
    mapper = getattr(cls, "hf_to_vllm_mapper", None)
    if mapper is None:
        return []
    mapper = mapper.get_rename_mapper()
    if mapper.orig_to_new_renaming:
        raise NotImplementedError(f"{cls.__name__}: renames by transformers' WeightRenaming are not listed here")
    return [
        *(("regex", pattern.pattern, new) for pattern, new in mapper.orig_to_new_regex.items()),
        *(("substr", old, new) for old, new in mapper.orig_to_new_substr.items()),
        *(("prefix", old, new) for old, new in mapper.orig_to_new_prefix.items()),
        *(("suffix", old, new) for old, new in mapper.orig_to_new_suffix.items()),
    ]


def main() -> None:
    """Print the classes; draft models of speculative decoding are left out, since they are not served by themselves."""
    lora: dict[str, object] = {}
    without_lora, unknown = [], []
    for name, registered in sorted(ModelRegistry.models.items()):
        if name in _SPECULATIVE_DECODING_MODELS:
            continue
        try:
            cls = registered.load_model_cls()
        except ImportError as error:  # needs CUDA, or a package that vLLM does not require
            print(f"{name}: {error}", file=sys.stderr)
            unknown.append(name)
            continue
        if supports_lora(cls):
            lora[name] = describe(name, cls)
        else:
            without_lora.append(name)
    version = vllm.__version__.partition("+")[0]
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in lora.items())
    print('{\n "source": "model classes of vLLM, listed by serve/vllm-cpu/list_architectures.py",')
    print(f' "version": {json.dumps(version)},\n "without_lora": {json.dumps(without_lora)},')
    print(f' "unknown": {json.dumps(unknown)},\n "lora": {{\n{lines}\n }}\n}}')


if __name__ == "__main__":
    main()
