"""The adapter in a folder, plain or with cores, read as an `AdapterDir`."""

from __future__ import annotations

from pathlib import Path

from loraover.checkpoint.files import META_FILE
from loraover.checkpoint.peft_adapter import AdapterDir, read_adapter_dir
from loraover.common.paths import kind_of


def read_source(path: Path) -> AdapterDir:
    """Read the LoRA-Over checkpoint in a folder, or the plain LoRA adapter if it holds no cores."""
    if kind_of(path / META_FILE) is None:
        return read_adapter_dir(path)
    from loraover.checkpoint.checkpoint import read_checkpoint

    return read_checkpoint(path)
