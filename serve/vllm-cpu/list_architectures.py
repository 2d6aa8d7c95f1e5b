"""Which of vLLM's model classes take LoRA adapters, as JSON on standard output.

Run by the Python of an environment that holds vLLM (`make vllm-architectures`); nothing is built or downloaded.
"""

from __future__ import annotations

import json
import sys

import vllm
from vllm.model_executor.models.interfaces import supports_lora, supports_multimodal
from vllm.model_executor.models.registry import _SPECULATIVE_DECODING_MODELS, ModelRegistry


def describe(cls: type) -> dict[str, object]:
    """What decides which adapters a class takes; see vllm/lora/model_manager.py."""
    return {
        "embeddings": sorted(cls.embedding_modules),
        "packed": {name: list(parts) for name, parts in cls.packed_modules_mapping.items()},
        "multimodal": supports_multimodal(cls) and hasattr(cls, "get_mm_mapping"),
    }


def main() -> None:
    """Draft models of speculative decoding are left out: they are not served by themselves."""
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
            lora[name] = describe(cls)
        else:
            without_lora.append(name)
    version = vllm.__version__.partition("+")[0]
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in lora.items())
    print('{\n "source": "model classes of vLLM, listed by serve/vllm-cpu/list_architectures.py",')
    print(f' "version": {json.dumps(version)},\n "without_lora": {json.dumps(without_lora)},')
    print(f' "unknown": {json.dumps(unknown)},\n "lora": {{\n{lines}\n }}\n}}')


if __name__ == "__main__":
    main()
