"""LoRA-Over's lab: studies of methods, benchmarks of adapters, and methods of other papers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraover.common.later import names_on_first_use

if TYPE_CHECKING:
    from loraover_lab.evaluation.results import Evaluation as Evaluation
    from loraover_lab.evaluation.run import evaluate as evaluate
    from loraover_lab.study.forecast import PowerReport as PowerReport
    from loraover_lab.study.forecast import predict_power as predict_power
    from loraover_lab.study.report import StudyReport as StudyReport
    from loraover_lab.study.runner import run_study as run_study

__getattr__, __all__ = names_on_first_use(__name__, __file__)
