"""The kind of an adapter, and how its file is laid out, read from its configuration and keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraover.adapters.convert.methods import METHODS
from loraover.adapters.convert.methods.base import AnyMethod, Refused
from loraover.adapters.convert.others import check_fields
from loraover.adapters.convert.source import AdapterLayout, read_layout, read_peft_type
from loraover.checkpoint.files import CONFIG_FILE
from loraover.common.errors import CheckpointError, ExportError


def read_method(path: Path) -> tuple[AnyMethod, AdapterLayout[Any]]:
    """Read what kind of adapter a folder holds, and its layout.

    Raises:
        CheckpointError: An adapter that cannot be trusted, or of a kind that is not known.
        ExportError: An adapter that is no change of weights, or that changes more than weights.
    """
    kind = read_peft_type(path)
    method = METHODS.get(kind)
    where = path / CONFIG_FILE
    if method is None:
        raise CheckpointError(
            f"{where}: peft_type is {kind!r:.80}, which this version does not know; it knows {', '.join(METHODS)}."
        )
    if isinstance(method, Refused):
        raise ExportError(f"{where}: a {kind} adapter cannot become a LoRA: it {method.reason}")
    layout = read_layout(path, method.config, method.tensors, method.shared)
    check_fields(layout, method)
    if not layout.modules:
        raise CheckpointError(
            f"{layout.tensors_path}: no tensor of a {kind} adapter ({', '.join(method.tensors[:4])}); the file "
            "names no adapted module, so it is incomplete or was saved without them."
        )
    return method, layout
