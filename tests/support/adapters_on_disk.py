"""Adapters of a tiny base model on disk, and their deltas by NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from support import merge_cases
from support.make_checkpoint import LINEAR
from support.tiny_models import tiny_llama, with_lora

Array = npt.NDArray[np.float64]


def save_base(folder: Path, make: Callable[[], Any] = tiny_llama, dtype: torch.dtype = torch.float32) -> Path:
    make().to(dtype).save_pretrained(folder)
    return folder


def save_lora(base: Path, folder: Path, seed: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A LoRA that PEFT made and saved, with no matrix of zeros."""
    from transformers import AutoModelForCausalLM

    chosen: dict[str, Any] = {"r": 4, "lora_alpha": 5, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | options
    model = with_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), seed=seed, **chosen)
    model.to(dtype).save_pretrained(folder)
    return folder


def save_shards(folder: Path) -> tuple[Path, Path]:
    """A base model in several shards with a tokenizer's file, tied and in bfloat16, and an adapter of its head."""
    base = folder / "base"
    model = tiny_llama(tie_word_embeddings=True).to(torch.bfloat16)
    model.save_pretrained(base, max_shard_size="8KB")
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"left out")
    return base, save_lora(base, folder / "adapter", target_modules=["lm_head", "q_proj"])


def deltas(folder: Path) -> dict[str, Array]:
    """scaling B A of each module, (out, in), in the words of `adapter_config.json`."""
    return {module: delta.astype(np.float64) for module, delta in merge_cases.deltas(folder).items()}
