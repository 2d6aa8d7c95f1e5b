"""Folds through the command, of adapters of many kinds, and what they wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraover_export.fold.report import FoldCertificate

from support.make_checkpoint import EMBEDDING, LINEAR, Made

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LORA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR},
    "rslora": {"use_rslora": True, "r": 2},
    "patterns": {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}},
    "embedding": {"target_modules": EMBEDDING},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all", "base_options": {"attention_bias": True}},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
FILES = ADAPTER | {"fold_certificate.json", "fold.html", "README.md"}
Q_A, Q_B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{kind}.weight" for kind in "AB")
"""Names of the tensors of the first query projection."""
HALF = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
"""Largest error of one rounding to nearest, relative to the number, by the type."""


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def certificate(folder: Path) -> FoldCertificate:
    return FoldCertificate.model_validate_json((folder / "fold_certificate.json").read_bytes())


def load_base(made: Made) -> Any:
    return AutoModelForCausalLM.from_pretrained(made.base)
