"""LoRA-Over's lab: studies of methods, benchmarks of adapters, and methods of other papers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraover_lab.evaluation.results import Evaluation as Evaluation
    from loraover_lab.evaluation.run import evaluate as evaluate
    from loraover_lab.study.power import PowerReport as PowerReport
    from loraover_lab.study.power import predict_power as predict_power
    from loraover_lab.study.report import StudyReport as StudyReport
    from loraover_lab.study.runner import run_study as run_study


_HOMES = {
    "Evaluation": "evaluation.results",
    "PowerReport": "study.power",
    "StudyReport": "study.report",
    "evaluate": "evaluation.run",
    "predict_power": "study.power",
    "run_study": "study.runner",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import on first use, so that commands start fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'loraover_lab' has no attribute {name!r}")
    return getattr(import_module(f"loraover_lab.{_HOMES[name]}"), name)
