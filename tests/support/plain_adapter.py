"""Plain PEFT adapters written key by key, and tiny decoders of several families to put them on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.tiny_models import VOCABULARY, fill_b, with_lora

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma")
"""Decoders that vLLM serves with adapters; `tiny_decoder` makes each."""

TEXT_CONFIGS = {"Gemma3": "Gemma3TextConfig", "Gemma3n": "Gemma3nTextConfig", "Llama4": "Llama4TextConfig"}
"""Configurations of decoders whose family also has images."""


def write_adapter(folder: Path, matrices: Mapping[str, tuple[Tensor, Tensor]], **config: Any) -> Path:
    """An adapter of these (A, B) by module path; returns `folder`."""
    folder.mkdir(parents=True)
    tensors = {}
    for module, (a, b) in matrices.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    r = len(next(iter(matrices.values()))[0])
    content = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 2 * r}
    content |= {"target_modules": list(matrices)} | config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def tiny_decoder(family: str, seed: int = 0, **changes: Any) -> Any:
    """Two layers, hidden size 64, heads of 32: the smallest that vLLM serves."""
    import transformers

    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(transformers, TEXT_CONFIGS.get(family, f"{family}Config"))(**(config | changes))
        return getattr(transformers, f"{family}ForCausalLM")(made).eval()


def make_adapter(folder: Path, family: str, **lora: Any) -> Path:
    """A base model of the family in `folder/base` and an adapter of two ranks in `folder/adapter`; returns that."""
    tiny_decoder(family).save_pretrained(folder / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    options: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 12,
        "rank_pattern": {"q_proj": 6},
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    model = with_lora(base, draw_b=False, seed=1, **(options | lora))
    fill_b(model, seed=2)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"
