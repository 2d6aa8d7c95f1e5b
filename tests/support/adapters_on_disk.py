"""Adapters of a tiny base model on disk, and their deltas by NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from support.make_checkpoint import numpy64
from support.tiny_models import fill_b, tiny_llama

Array = npt.NDArray[np.float64]

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_base(folder: Path, make: Callable[[], Any] = tiny_llama, dtype: torch.dtype = torch.float32) -> Path:
    make().to(dtype).save_pretrained(folder)
    return folder


def save_lora(base: Path, folder: Path, seed: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A LoRA that PEFT made and saved, with no matrix of zeros."""
    from transformers import AutoModelForCausalLM

    chosen = {"r": 4, "lora_alpha": 5, "target_modules": ALL, "task_type": "CAUSAL_LM"} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**chosen))
    fill_b(model, seed)
    model.to(dtype).save_pretrained(folder)
    return folder


def deltas(folder: Path) -> dict[str, Array]:
    """scaling B A of each module, (out, in), in the words of `adapter_config.json`."""
    config = json.loads((folder / "adapter_config.json").read_text())
    found: Mapping[str, Tensor] = load_file(folder / "adapter_model.safetensors")
    result = {}
    for key, a in found.items():
        if "lora_A" not in key and "lora_embedding_A" not in key:
            continue
        module = key.removeprefix("base_model.model.").partition(".lora_")[0]
        alpha = next((v for k, v in config["alpha_pattern"].items() if module.endswith(k)), config["lora_alpha"])
        scaling = alpha / (sqrt(len(a)) if config["use_rslora"] else len(a))
        b = found[key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")]
        result[module] = scaling * (numpy64(b) @ numpy64(a))
    return result
