"""The exports that take any plain LoRA, for tests of what all of them do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import loraover_export
from loraover_export import convert_adapter, export_gguf, merge_adapter
from loraover_export.publishing import PRODUCTS

ADAPTERS = [verb for verb in PRODUCTS if verb not in ("fold", "merge", "onnx")]
"""Verbs that write a folder with A and B alone, in the form of an engine."""

REFUSING: dict[str, Callable[[Path, Path], object]] = {
    "convert": convert_adapter,
    "gguf": export_gguf,
    "merge": merge_adapter,
    **{verb: getattr(loraover_export, f"export_{verb}") for verb in ADAPTERS if verb != "vllm"},
}
"""Functions that raise an error for an adapter that they do not write; `export_vllm` reports what it has found."""
