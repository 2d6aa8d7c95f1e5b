"""The chat template of an adapter, which may be another one than its base model's, and travels with it."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from loraover.checkpoint.files import TEMPLATE_FILE
from loraover.common.atomic_output import publish_file
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


def keep_chat_template(adapter: Path, written: Path, *, stem: str | None = None) -> None:
    """Copy the chat template of an adapter, if it has one, beside what an export writes of it.

    Args:
        adapter: Folder of the adapter.
        written: Folder of the export.
        stem: Beginning of the file's name, where the folder may hold several adapters. An earlier file of this name
            is removed.

    Raises:
        OutputError: The file cannot be read or written.
    """
    template, place = adapter / TEMPLATE_FILE, written / TEMPLATE_FILE
    if stem is not None:
        place = written / f"{stem}.{TEMPLATE_FILE}"
        place.unlink(missing_ok=True)
    if template.is_file():
        publish_file(place, lambda draft: shutil.copyfile(template, draft))


def tokenizer_of(adapter: Path, tokenizer: Any) -> Any:
    """Return a base model's tokenizer; if an adapter has another chat template, a copy with that one.

    Args:
        adapter: Folder of the adapter.
        tokenizer: The tokenizer.

    Raises:
        CheckpointError: A template that cannot be read.
    """
    template, known = chat_template_of(adapter), tokenizer.chat_template
    if template is None or template in (known.values() if isinstance(known, dict) else [known]):
        return tokenizer
    own = copy.copy(tokenizer)
    own.chat_template = template
    return own
