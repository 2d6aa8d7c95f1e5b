"""LoRA-Over: train adapters with more capacity, ship plain LoRA."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraover.callback import LoraOverCallback
    from loraover.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
    from loraover.config import LoraOverConfig
    from loraover.overparam import OverParameterization

__version__ = "0.1.0"

_HOMES = {
    "Checkpoint": "checkpoint",
    "LoraOverCallback": "callback",
    "LoraOverConfig": "config",
    "OverParameterization": "overparam",
    "read_checkpoint": "checkpoint",
    "write_checkpoint": "checkpoint",
}

__all__ = [
    "Checkpoint",
    "LoraOverCallback",
    "LoraOverConfig",
    "OverParameterization",
    "read_checkpoint",
    "write_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that commands start fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'loraover' has no attribute {name!r}")
    return getattr(import_module(f"loraover.{_HOMES[name]}"), name)
