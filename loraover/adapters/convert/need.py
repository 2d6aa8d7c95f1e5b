"""Whether an adapter has to be converted before the exports can take it, found from its configuration and keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loraover.adapters.convert.methods.lora import Lora, LoraFields
from loraover.adapters.convert.prefix import find_move
from loraover.adapters.convert.source import MethodConfig, read_layout, read_peft_type
from loraover.checkpoint.files import CONFIG_FILE, META_FILE
from loraover.common.strict_json import read_json


def named_base(path: Path) -> MethodConfig:
    """Return the configuration of an adapter of any kind, which names its base model.

    Raises:
        CheckpointError: The folder holds no adapter.
    """
    read_peft_type(path)
    return read_json(path / CONFIG_FILE, MethodConfig)


def why_convert(path: Path, shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """Return the reason for which an adapter has to be converted, as a noun phrase; None if the exports take it.

    Args:
        path: Folder of a LoRA-Over checkpoint, or of an adapter of any kind.
        shapes: Shapes of the base model's linear layers and embeddings, by path.

    Raises:
        CheckpointError: The folder holds no adapter.
        ExportError: The adapter's modules have another prefix than the base model's, and several fit.
    """
    kind = read_peft_type(path)
    if kind != "LORA":
        return f"an adapter of the kind {kind}"
    config = read_json(path / CONFIG_FILE, LoraFields)
    if not (path / META_FILE).exists():
        if config.use_dora:
            return "a DoRA"
        if config.subtracted_initialisation is not None:
            return f"a LoRA that was started by {config.init_lora_weights}, which changes the base weights"
        if config.trainable_token_indices:
            return "a LoRA with single trained tokens"
    layout = read_layout(path, LoraFields, Lora.tensors, Lora.shared)
    if layout.keys or find_move(layout, shapes) is not None:
        return "a LoRA whose modules have another prefix than the base model's"
    return None
