"""Runs, memory and time that a study needs, told before its first run."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from loraover.common.errors import ConfigError
from loraover.common.provenance import environment, today
from loraover.common.strict_json import StrictModel
from loraover.sources.verb import verb
from loraover.training.plan import make_plan
from loraover_lab.study.grid import Run, grid_of
from loraover_lab.study.report import StudyAnswer
from loraover_lab.study.request import StudyRequest
from loraover_lab.study.tuning import by_method


class MethodPlan(StrictModel):
    """Needs of the runs of a method on a task."""

    task: str = Field(description="Name of the task.")
    method: str = Field(description="Name of the method in reports.")
    runs: int = Field(description="Number of runs.")
    steps: int = Field(description="Optimizer steps of a run.")
    held_bytes: int = Field(description="Bytes of weights, cores, gradients and optimizer states of a run.")
    activations: int | None = Field(description="Estimated bytes of activations; None: they depend on the values.")
    step_seconds: float | None = Field(description="Seconds of a step, from a trial on this machine; None: no trial.")

    @property
    def hours(self) -> float | None:
        """Hours of all runs, one after another, without evaluation; None: not predicted."""
        return None if self.step_seconds is None else self.runs * self.steps * self.step_seconds / 3600


class StudyPlan(StudyAnswer):
    """Contents of `loraover study --plan --json`."""

    methods: list[MethodPlan] = Field(description="Needs of each method on each task.")

    @property
    def runs(self) -> int:
        """Number of all runs."""
        return sum(one.runs for one in self.methods)

    @property
    def hours(self) -> float | None:
        """Hours of all runs; None where those of one method are not predicted."""
        known = [one.hours for one in self.methods if one.hours is not None]
        return sum(known) if len(known) == len(self.methods) else None


@verb(StudyRequest)
def plan_study(request: StudyRequest) -> StudyPlan:
    """Tell how many runs a study needs, with their memory and time, without reading weights.

    Each method on each task is planned as `loraover train --plan` does it, with a trial of a few steps where this
    machine bears one.

    Raises:
        ConfigError: The request is not a study, or a run of it would be refused.
        DataError: The data cannot be read.
    """
    command, request = request.command(), request.whole()
    if request.power is not None:
        raise ConfigError(f"{StudyRequest.named('power')} and {StudyRequest.named('plan')} are two questions; ask one.")
    found = [_planned(runs, request) for methods in by_method(grid_of(request)).values() for runs in methods.values()]
    return StudyPlan(methods=found, command=command, versions=environment("transformers"), date=today())


def _planned(runs: Sequence[Run], request: StudyRequest) -> MethodPlan:
    first = runs[0]
    name = first.short or first.method
    request.report.line(f"{first.task}, {name}")
    plan = make_plan(first.recipe, request.report, tries=True)
    tuning = request.tuning_seeds or request.seeds
    return MethodPlan(
        task=first.task,
        method=name,
        runs=sum(run.seed < tuning for run in runs) + request.seeds - tuning,
        steps=plan.steps,
        held_bytes=plan.held,
        activations=plan.activations,
        step_seconds=plan.step_seconds,
    )
