"""The command `loraover eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraover.evaluation.request import EvaluationRequest
from loraover.reporting.request_command import request_command

if TYPE_CHECKING:
    from loraover.evaluation.results import Evaluation


def _evaluate(request: EvaluationRequest, as_json: bool) -> int:
    """Show what is finished at Ctrl-C and after a failure too."""
    from dataclasses import replace

    from rich.console import Console

    from loraover.common.command_line import quiet_libraries
    from loraover.sources.verb import perform

    quiet_libraries()
    from loraover.evaluation.results import show_evaluation
    from loraover.evaluation.run import evaluate
    from loraover.reporting.reporter import ConsoleReporter

    console = Console(stderr=as_json)
    finished: list[Evaluation] = []
    try:
        asked = replace(request, on_result=finished.append, report=ConsoleReporter(console))
        found = perform(evaluate, asked)
    finally:
        if finished:
            show_evaluation(finished[-1], console)
    if as_json:
        print(found.model_dump_json(indent=1))
    return found.exit_code


evaluate_command = request_command(EvaluationRequest, _evaluate)
