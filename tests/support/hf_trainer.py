"""A Trainer on a tiny Llama with the callback, and a look at the checkpoints that it leaves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from loraover import LoraOverCallback, read_checkpoint
from loraover.checkpoint.peft_adapter import site_key
from loraover.checkpoint.tensor_file import open_tensors
from loraover.common.arrays import as_array

from support.tiny_models import lora_matrices, tiny_llama, token_ids, with_lora

DATA = [{"input_ids": row, "labels": row} for row in token_ids(seed=7, batch=24)]


def arguments(folder: Path, kind: Any = TrainingArguments, **changes: Any) -> Any:
    chosen = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return kind(**(chosen | changes))


def llama(**options: Any) -> Any:
    return with_lora(tiny_llama(), task_type="CAUSAL_LM", **options)


def trainer_of(
    folder: Path, model: Any = None, callback: LoraOverCallback | None = None, optimizer: Any = None, **changes: Any
) -> Any:
    return Trainer(
        model or llama(),
        arguments(folder, **changes),
        train_dataset=DATA,
        callbacks=[callback or LoraOverCallback()],
        optimizers=(optimizer, None),
    )


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    with open_tensors(folder / "adapter_model.safetensors") as file:
        return {key: file.read(key) for key in file.keys}


def assert_holds(model: nn.Module, folder: Path) -> None:
    """The model's matrices are those of the adapter in `folder`, bit for bit."""
    stored = adapter_tensors(folder)
    held = {re.sub(r"(lora_[AB])\.\w+", r"\1", key): matrix for key, matrix in lora_matrices(model).items()}
    assert held.keys() == stored.keys()
    assert [key for key in held if not torch.equal(held[key], stored[key])] == []


def assert_contracted(folder: Path, sites: int) -> None:
    """The adapter in a checkpoint is the contraction of the cores beside it."""
    checkpoint = read_checkpoint(folder)
    assert len(checkpoint.sites) == sites
    stored = adapter_tensors(folder)
    with open_tensors(checkpoint.cores_path) as file:
        for site in checkpoint.meta.sites:
            cores = checkpoint.read_cores(file, site)
            matrix, _ = checkpoint.check_stored(as_array(stored[site_key(site.name)]), cores, site)
            assert matrix.any()
