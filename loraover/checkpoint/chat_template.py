"""The chat template of an adapter, which may be another one than its base model's, and travels with it."""

from __future__ import annotations

import shutil
from pathlib import Path

from loraover.checkpoint.files import TEMPLATE_FILE
from loraover.common.errors import CheckpointError


def chat_template_of(adapter: Path) -> str | None:
    """Return the chat template in an adapter's folder; None if there is none.

    Raises:
        CheckpointError: A file that cannot be read.
    """
    path = adapter / TEMPLATE_FILE
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def keep_chat_template(adapter: Path, written: Path) -> None:
    """Copy the chat template of an adapter, if it has one, to the draft of what an export writes of it.

    Raises:
        OSError: The file cannot be read or written.
    """
    if (adapter / TEMPLATE_FILE).is_file():
        shutil.copyfile(adapter / TEMPLATE_FILE, written / TEMPLATE_FILE)
