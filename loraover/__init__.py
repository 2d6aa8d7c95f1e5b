"""LoRA-Over: train adapters with extra parameters, ship plain LoRA."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loraover.common.version import __version__

if TYPE_CHECKING:
    from loraover.callbacks.diagnostics import DiagnosticsCallback
    from loraover.callbacks.loraover_callback import LoraOverCallback
    from loraover.callbacks.seal_checkpoints import SealCheckpoints, last_whole_checkpoint, seal
    from loraover.callbacks.trainer_loss import trainer_loss
    from loraover.checkpoint.checkpoint import Checkpoint, read_checkpoint
    from loraover.checkpoint.resume import restore
    from loraover.checkpoint.write_checkpoint import write_checkpoint
    from loraover.common.reporter import Reporter
    from loraover.evaluation.results import Evaluation
    from loraover.evaluation.run import evaluate
    from loraover.inspection.folder import inspect_folder
    from loraover.inspection.installation import Installation, check_installation
    from loraover.inspection.report import FolderReport
    from loraover.overparam.config import Budget, LoraOverConfig
    from loraover.overparam.importance import Probe
    from loraover.overparam.parameterization import OverParameterization
    from loraover.overparam.sharding import trainable_state_dict
    from loraover.reporting.reporter import ConsoleReporter
    from loraover.study.power import PowerReport, predict_power
    from loraover.study.report import StudyReport
    from loraover.study.runner import run_study
    from loraover.training.recipe import Recipe, load_recipe
    from loraover.training.run import train
    from loraover.training.run_result import RunResult, read_run


_HOMES = {
    "Budget": "overparam.config",
    "Checkpoint": "checkpoint.checkpoint",
    "ConsoleReporter": "reporting.reporter",
    "DiagnosticsCallback": "callbacks.diagnostics",
    "Evaluation": "evaluation.results",
    "FolderReport": "inspection.report",
    "Installation": "inspection.installation",
    "LoraOverCallback": "callbacks.loraover_callback",
    "LoraOverConfig": "overparam.config",
    "OverParameterization": "overparam.parameterization",
    "PowerReport": "study.power",
    "Probe": "overparam.importance",
    "Recipe": "training.recipe",
    "Reporter": "common.reporter",
    "RunResult": "training.run_result",
    "SealCheckpoints": "callbacks.seal_checkpoints",
    "StudyReport": "study.report",
    "check_installation": "inspection.installation",
    "evaluate": "evaluation.run",
    "inspect_folder": "inspection.folder",
    "last_whole_checkpoint": "callbacks.seal_checkpoints",
    "load_recipe": "training.recipe",
    "predict_power": "study.power",
    "read_checkpoint": "checkpoint.checkpoint",
    "read_run": "training.run_result",
    "restore": "checkpoint.resume",
    "run_study": "study.runner",
    "seal": "callbacks.seal_checkpoints",
    "train": "training.run",
    "trainable_state_dict": "overparam.sharding",
    "trainer_loss": "callbacks.trainer_loss",
    "write_checkpoint": "checkpoint.write_checkpoint",
}

__all__ = [
    "Budget",
    "Checkpoint",
    "ConsoleReporter",
    "DiagnosticsCallback",
    "Evaluation",
    "FolderReport",
    "Installation",
    "LoraOverCallback",
    "LoraOverConfig",
    "OverParameterization",
    "PowerReport",
    "Probe",
    "Recipe",
    "Reporter",
    "RunResult",
    "SealCheckpoints",
    "StudyReport",
    "__version__",
    "check_installation",
    "evaluate",
    "inspect_folder",
    "last_whole_checkpoint",
    "load_recipe",
    "predict_power",
    "read_checkpoint",
    "read_run",
    "restore",
    "run_study",
    "seal",
    "train",
    "trainable_state_dict",
    "trainer_loss",
    "write_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that commands start fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'loraover' has no attribute {name!r}")
    return getattr(import_module(f"loraover.{_HOMES[name]}"), name)
