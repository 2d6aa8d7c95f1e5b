"""Commands of research, which the command `loraover` finds by entry points of the group `loraover.commands`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraover.common.request import AnyPaths, Request, argument
from loraover.reporting.request_command import Reporting, request_command
from loraover_lab.evaluation.request import EvaluationRequest
from loraover_lab.study.request import StudyRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from loraover.training.run_result import RunResult
    from loraover_lab.evaluation.results import Evaluation

REQUEST = "loraover_lab.study.request:StudyRequest"
STUDY = Reporting(REQUEST, "loraover_lab.study.runner:run_study", "loraover_lab.study.show:show_study")
POWER = Reporting(REQUEST, "loraover_lab.study.forecast:predict_power", "loraover_lab.study.show:show_power")
PLAN = Reporting(REQUEST, "loraover_lab.study.forecast:plan_study", "loraover_lab.study.show:show_study_plan")


def _study(request: StudyRequest, as_json: bool) -> int:
    asked = PLAN if request.plan else STUDY if request.power is None else POWER
    return asked.run(request, as_json)


def _evaluate(request: EvaluationRequest, as_json: bool) -> int:
    """Run an evaluation, and show its finished results even after Ctrl-C or a failure."""
    from dataclasses import replace

    from rich.console import Console

    from loraover.common.command_line import quiet_libraries
    from loraover.sources.verb import perform

    quiet_libraries()
    from loraover.reporting.reporter import ConsoleReporter
    from loraover_lab.evaluation.results import show_evaluation
    from loraover_lab.evaluation.run import evaluate

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


@dataclass(frozen=True)
class CompareRequest(Request):
    """Show finished runs side by side: method, data, parameters, losses.

    Each RUN is a folder of `loraover train`.
    """

    verb = "loraover compare"
    examples = ("loraover compare runs/demo-1 runs/demo-2",)

    runs: AnyPaths = argument("Folders of finished runs.", metavar="RUN...")


def _compare(request: CompareRequest, as_json: bool) -> None:
    import json

    from loraover.training.run_result import read_run

    results = {str(run): read_run(run) for run in request.runs}
    if as_json:
        print(json.dumps({run: result.model_dump(mode="json") for run, result in results.items()}, indent=1))
        return
    from rich.console import Console

    show_runs(results, Console())


def show_runs(results: Mapping[str, RunResult], console: Console) -> None:
    """Print a line for each value that all runs share, then a table of the others with one column for each run."""
    from loraover.common.errors import printable
    from loraover.reporting.table import Column, Table

    facts = {run: result.facts() for run, result in results.items()}
    names = dict.fromkeys(name for found in facts.values() for name in found)
    common = {name: {found.get(name, "") for found in facts.values()} for name in names}
    shared = [name for name in names if len(facts) > 1 and len(common[name]) == 1]
    for name in shared:
        console.print(printable(f"{name}: {common[name].pop()}"), markup=False, highlight=False)

    def column(run: str) -> Column[str]:
        return Column(run, lambda name: facts[run].get(name, "-"), "name")

    rows = [name for name in names if name not in shared]
    console.print(Table([Column("", lambda name: name, "name"), *map(column, facts)], rows))


study = request_command(StudyRequest, _study)
evaluate = request_command(EvaluationRequest, _evaluate)
compare = request_command(CompareRequest, _compare)
