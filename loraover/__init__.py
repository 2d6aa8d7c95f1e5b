"""LoRA-Over: train adapters with more capacity, ship plain LoRA."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loraover.common.version import __version__

if TYPE_CHECKING:
    from loraover.callbacks.diagnostics import DiagnosticsCallback
    from loraover.callbacks.loraover_callback import LoraOverCallback
    from loraover.callbacks.seal_checkpoints import SealCheckpoints, last_whole_checkpoint, seal
    from loraover.checkpoint.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
    from loraover.checkpoint.resume import restore
    from loraover.overparam.config import Budget, LoraOverConfig
    from loraover.overparam.importance import Probe
    from loraover.overparam.parameterization import OverParameterization
    from loraover.overparam.sharding import trainable_state_dict
    from loraover.reporting.reporter import ConsoleReporter, Reporter


_HOMES = {
    "Budget": "overparam.config",
    "Checkpoint": "checkpoint.checkpoint",
    "ConsoleReporter": "reporting.reporter",
    "DiagnosticsCallback": "callbacks.diagnostics",
    "LoraOverCallback": "callbacks.loraover_callback",
    "LoraOverConfig": "overparam.config",
    "OverParameterization": "overparam.parameterization",
    "Probe": "overparam.importance",
    "Reporter": "reporting.reporter",
    "SealCheckpoints": "callbacks.seal_checkpoints",
    "last_whole_checkpoint": "callbacks.seal_checkpoints",
    "read_checkpoint": "checkpoint.checkpoint",
    "restore": "checkpoint.resume",
    "seal": "callbacks.seal_checkpoints",
    "trainable_state_dict": "overparam.sharding",
    "write_checkpoint": "checkpoint.checkpoint",
}

__all__ = [
    "Budget",
    "Checkpoint",
    "ConsoleReporter",
    "DiagnosticsCallback",
    "LoraOverCallback",
    "LoraOverConfig",
    "OverParameterization",
    "Probe",
    "Reporter",
    "SealCheckpoints",
    "__version__",
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
