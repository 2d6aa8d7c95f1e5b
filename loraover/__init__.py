"""LoRA-Over: train adapters with extra parameters, ship plain LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraover.common.later import names_on_first_use
from loraover.common.version import __version__

if TYPE_CHECKING:
    from loraover.callbacks.calibration import trainer_loss as trainer_loss
    from loraover.callbacks.diagnostics import DiagnosticsCallback as DiagnosticsCallback
    from loraover.callbacks.loraover_callback import LoraOverCallback as LoraOverCallback
    from loraover.callbacks.seal_checkpoints import SealCheckpoints as SealCheckpoints
    from loraover.callbacks.seal_checkpoints import last_whole_checkpoint as last_whole_checkpoint
    from loraover.callbacks.seal_checkpoints import seal as seal
    from loraover.checkpoint.checkpoint import Checkpoint as Checkpoint
    from loraover.checkpoint.checkpoint import read_checkpoint as read_checkpoint
    from loraover.checkpoint.training_state import restore as restore
    from loraover.checkpoint.training_state import write_checkpoint as write_checkpoint
    from loraover.common.reporter import Reporter as Reporter
    from loraover.inspection.folder import inspect_folder as inspect_folder
    from loraover.inspection.installation import Installation as Installation
    from loraover.inspection.installation import check_installation as check_installation
    from loraover.inspection.report import FolderReport as FolderReport
    from loraover.overparam.config import Budget as Budget
    from loraover.overparam.config import LoraOverConfig as LoraOverConfig
    from loraover.overparam.parameterization import OverParameterization as OverParameterization
    from loraover.overparam.probe import Probe as Probe
    from loraover.overparam.sharding import trainable_state_dict as trainable_state_dict
    from loraover.reporting.reporter import ConsoleReporter as ConsoleReporter
    from loraover.training.recipe import Recipe as Recipe
    from loraover.training.recipe import load_recipe as load_recipe
    from loraover.training.run.train import train as train
    from loraover.training.run_result import RunResult as RunResult
    from loraover.training.run_result import read_run as read_run

_OF_THE_LAB = ("Evaluation", "PowerReport", "StudyReport", "evaluate", "predict_power", "run_study")
__getattr__, _names = names_on_first_use(__name__, __file__, _OF_THE_LAB)
__all__ = ["__version__", *_names]
