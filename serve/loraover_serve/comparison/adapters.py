"""Adapters that engines are compared on: checks of the user's adapter, and adapters written beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from loraover.adapters.uniform.refusals import check_no_experts
from loraover.checkpoint.files import CONFIG_FILE, TENSORS_FILE
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.checkpoint.tensor_file import open_tensors, save_tensors
from loraover.common.errors import ConfigError, ExportError
from loraover.models.load import ModelSource, is_encoder_decoder
from loraover.models.model_file import embeds_texts
from loraover_export.formats.onnx.inputs import find_task


def check_plain(adapter: AdapterDir, reader: str) -> None:
    """Refuse an adapter that changes the base weights, or that adapts stacked experts.

    Args:
        reader: What cannot read it, as the subject of "applies no LoRA of experts".

    Raises:
        CheckpointError: An adapter whose A and B only fit a changed base model.
        ExportError: An adapter of stacked experts.
    """
    adapter.check_keeps_base()
    check_no_experts(adapter, reader)


def check_task(adapter: AdapterDir, base: ModelSource, command: str) -> None:
    """Refuse an adapter that is not one of a causal language model.

    Args:
        base: Its base model.
        command: The command that compares next tokens.

    Raises:
        ConfigError: Another task.
    """
    task = adapter.config.task_type
    generates = task == "CAUSAL_LM" or (task is None and not embeds_texts(base))
    if generates and not is_encoder_decoder(base):
        return
    try:
        find_task(task, base)
        remedy = "`loraover export onnx --mode merged` exports such a model and compares its outputs with PyTorch's."
    except (ConfigError, ExportError):
        remedy = "No export of ours takes such a model; serve it with PEFT."
    raise ConfigError(
        f"{adapter.path}: {base.name} with task_type {task!r} is not a causal language model, and {command} compares "
        f"next tokens. {remedy}{_OF_SERVERS if task in OF_VECTORS else ''}"
    )


OF_VECTORS = ("FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS")
"""PEFT's tasks whose answers are vectors, classes or scores."""
_OF_SERVERS = (
    " To check a server of such a model, record a reference with `loraover record`, and compare with "
    "`loraover verify --reference`."
)


def make_idle(like: AdapterDir, folder: Path) -> Path:
    """Write a LoRA with the ranks and targets of another whose A and B are zero, so that it changes nothing."""
    with open_tensors(like.tensors_path) as file:
        tensors = {key: torch.zeros_like(file.read(key)) for key in like.matrices}
    return write_like(like, tensors, folder)


def write_like(like: AdapterDir, tensors: dict[str, Tensor], folder: Path) -> Path:
    """Write an adapter with the configuration of another to a new folder, and return the folder."""
    folder.mkdir(parents=True)
    save_tensors(tensors, folder / TENSORS_FILE)
    shutil.copyfile(like.path / CONFIG_FILE, folder / CONFIG_FILE)
    return folder
