"""Base models with random weights, and checkpoints on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loraover import LoraOverConfig, OverParameterization, write_checkpoint

from benchmarks.clock import find_device
from benchmarks.shapes import SIZES
from benchmarks.training import add_lora
from support.tiny_hub import tiny_tokenizer

RANK = 16
B_SCALE = 0.02
"""Standard deviation of B, which PEFT starts at zero."""


def make_base(size: str, folder: Path) -> Any:
    """Write a base model in bfloat16, of a size of `SIZES`, and its tokenizer; return the model, on the device."""
    base = SIZES[size].random_model(find_device())
    base.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    base.name_or_path = str(folder)
    return base


def make_checkpoint(size: str, folder: Path) -> Path:
    """Write a base model and a checkpoint on it, whose B is not zero."""
    model, _ = add_lora(make_base(size, folder / "base"), RANK)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=B_SCALE)
    over = OverParameterization(model, LoraOverConfig(seed=0))
    model.save_pretrained(folder / "checkpoint")
    write_checkpoint(folder / "checkpoint", over, step=0)
    return folder / "checkpoint"
