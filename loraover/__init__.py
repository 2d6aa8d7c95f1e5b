"""LoRA-Over: train adapters with more capacity, ship plain LoRA."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraover.callback import LoraOverCallback
    from loraover.checkpoint import Checkpoint, read_checkpoint, restore, write_checkpoint
    from loraover.config import Budget, LoraOverConfig
    from loraover.diagnostics import DiagnosticsCallback
    from loraover.importance import Probe
    from loraover.overparam import OverParameterization
    from loraover.resume import SealCheckpoints, last_whole_checkpoint, seal
    from loraover.sharding import trainable_state_dict

__version__ = "0.1.0"

_HOMES = {
    "Budget": "config",
    "Checkpoint": "checkpoint",
    "DiagnosticsCallback": "diagnostics",
    "LoraOverCallback": "callback",
    "LoraOverConfig": "config",
    "OverParameterization": "overparam",
    "Probe": "importance",
    "SealCheckpoints": "resume",
    "last_whole_checkpoint": "resume",
    "read_checkpoint": "checkpoint",
    "restore": "checkpoint",
    "seal": "resume",
    "trainable_state_dict": "sharding",
    "write_checkpoint": "checkpoint",
}

__all__ = [
    "Budget",
    "Checkpoint",
    "DiagnosticsCallback",
    "LoraOverCallback",
    "LoraOverConfig",
    "OverParameterization",
    "Probe",
    "SealCheckpoints",
    "last_whole_checkpoint",
    "read_checkpoint",
    "restore",
    "seal",
    "trainable_state_dict",
    "write_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that commands start fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'loraover' has no attribute {name!r}")
    return getattr(import_module(f"loraover.{_HOMES[name]}"), name)
