"""Needs of a study, and the differences that it could show, estimated before its first run.

Memory and time come from plans of its runs, and the smallest difference from the spread of a pilot or of a kept study.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from loraover.common.errors import ConfigError
from loraover.common.provenance import environment, today
from loraover.common.strict_json import StrictModel
from loraover.sources.verb import verb
from loraover.training.plan import make_plan
from loraover.training.recipe import load_recipe
from loraover_lab.study.analysis import Halves, Spread, percent_variances
from loraover_lab.study.grid import grid_of, is_plain, slug
from loraover_lab.study.outcome import KEPT_FILE, KeptRun, check_held_out, read_kept
from loraover_lab.study.report import StudyAnswer
from loraover_lab.study.request import StudyRequest, study_tasks
from loraover_lab.study.tuning import by_method, losses_of, tokens_of_all, validation_loss


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
    """Estimate how many runs a study needs, and their memory and time, without reading weights.

    Each method on each task is planned as `loraover train --plan` does it, with a trial of a few steps where this
    machine bears one.
    """
    command, request = request.command(), request.whole()
    if request.power is not None:
        raise ConfigError(f"{StudyRequest.named('power')} and {StudyRequest.named('plan')} are two questions; ask one.")
    tuning, found = request.tuning_seeds or request.seeds, []
    for runs in (runs for methods in by_method(grid_of(request)).values() for runs in methods.values()):
        first = runs[0]
        name = first.short or first.method
        request.report.line(f"{first.task}, {name}")
        plan = make_plan(first.recipe, request.report, tries=True)
        found.append(
            MethodPlan(
                task=first.task,
                method=name,
                runs=sum(run.seed < tuning for run in runs) + request.seeds - tuning,
                steps=plan.steps,
                held_bytes=plan.held,
                activations=plan.activations,
                step_seconds=plan.step_seconds,
            )
        )
    return StudyPlan(methods=found, command=command, versions=environment("transformers"), date=today())


ENOUGH_SEEDS = 4
"""Seeds from which a pilot's spread is trusted: with two seeds, one spread in four is under a third of the true one."""
MOST = 10**7
"""Number of rows or seeds above which a study is taken to be impossible."""


class TaskPower(StrictModel):
    """The smallest difference that a study would see between a method and the baseline on one task."""

    task: str = Field(description="Name of the recipe.")
    method: str = Field(description="Method as the user named it.")
    baseline: str = Field(description="Plain LoRA that it is compared with.")
    measured_on: str = Field(description="Task of the pilot or kept study whose spread is used.")
    measured_seeds: int = Field(description="Number of seeds that the spread is measured with.")
    measured_rows: int = Field(description="Number of held-out examples that the spread is measured on.")
    seed_deviation: float = Field(description="Standard deviation of one seed's difference, in % of the baseline.")
    row_deviation: float = Field(description="Standard deviation of one example's difference, in % of the baseline.")
    rows: int = Field(description="Number of examples in the test half of the study.")
    seeds: int = Field(description="Number of seeds of the study.")
    smallest: float = Field(
        description="Smallest true difference, in %, that four of five studies of this task would show."
    )
    rows_to_halve: int | None = Field(description="Number of test rows that would halve it; None if no number would.")
    seeds_to_halve: int | None = Field(description="Number of seeds that would halve it; None if no number would.")
    factor_to_halve: float = Field(description="Factor by which both rows and seeds would have to grow to halve it.")


class PowerReport(StudyAnswer):
    """Contents of `loraover study --power STUDY --json`."""

    tasks: list[TaskPower] = Field(description="What each comparison could see.")
    unknown: list[str] = Field(
        description="Methods that are not compared: the pilot lacks two seeds of them beside a plain LoRA."
    )


@dataclass(frozen=True)
class MeasuredSpread:
    """Spread of a method's difference to a baseline, in squared % of the baseline's loss.

    Args:
        task: Task of the pilot or kept study.
        seeds: Number of seeds that both have.
        rows: Number of held-out examples.
        of_seed: Variance of one seed's difference.
        of_row: Variance of one example's share in the difference.
    """

    method: str
    baseline: str
    task: str
    seeds: int
    rows: int
    of_seed: float
    of_row: float

    def smallest(self, rows: int, seeds: int) -> float:
        """Smallest true difference, in %, that four of five studies with these numbers of rows and seeds would show."""
        return Spread((self.of_seed / seeds, self.of_row / rows), (seeds - 1, rows - 1)).detectable()


@verb(StudyRequest)
def predict_power(request: StudyRequest) -> PowerReport:
    """Predict the differences that a study could show, from the spread of finished runs of the same methods.

    A method on a task that the finished runs have has its spread there, and another one by its spread on each
    of their tasks.

    Returns:
        The smallest difference of each comparison, and the numbers of rows and of seeds that halve it.

    Raises:
        ConfigError: `power` is missing, or is a folder without two seeds of two of the methods.
        DataError: The held-out data cannot be read.
    """
    if request.power is None:
        raise ConfigError(f"{StudyRequest.named('power')} is missing, expected the folder of a pilot or kept study.")
    command, request = request.command(), request.whole()
    assert request.power is not None
    spelled = dict(zip(request.spelled(request.methods), request.methods, strict=True))
    spreads = measured_spreads(read_kept(request.power), spelled)
    if not spreads:
        methods = StudyRequest.named("methods")
        raise ConfigError(
            f"{StudyRequest.named('power', request.power)}: expected a {KEPT_FILE} with two seeds of a plain LoRA and "
            f"of another one of {methods} ({', '.join(request.methods)}), found none on any task. "
            f"Name the folder of a finished study, or train a pilot, best with {ENOUGH_SEEDS} seeds."
        )
    tasks: list[TaskPower] = []
    for task in study_tasks(request.recipes, request.models):
        count = check_held_out(load_recipe(task.recipe, dict(request.settings or {}) | task.settings))
        rows = len(range(*Halves(count).test.indices(count)))
        here = {spread.method for spread in spreads if spread.task == task.name}
        own = (spread for spread in spreads if spread.task == task.name or spread.method not in here)
        tasks += [_power(task.name, spread, rows, request.seeds) for spread in own]
    known = {name for spread in spreads for name in (spread.method, spread.baseline)}
    unknown = [name for name in spelled.values() if name not in known]
    versions = environment("numpy", "scipy")
    return PowerReport(tasks=tasks, unknown=unknown, command=command, versions=versions, date=today())


def measured_spreads(kept: Sequence[KeptRun], methods: Mapping[str, str]) -> list[MeasuredSpread]:
    """Measure the spread of each method's difference to the best plain LoRA, each at its best rate."""
    named = {slug(spelled): method for method, name in methods.items() for spelled in (name, method)}
    runs: dict[str, dict[str, dict[str, dict[str, KeptRun]]]] = {}
    for one in kept:
        task, name, rate, seed = one.run.split("/")
        if name in named and one.failure is None:
            runs.setdefault(task, {}).setdefault(named[name], {}).setdefault(rate, {})[seed] = one
    spreads = []
    for task, found in runs.items():
        every = (one for rates in found.values() for seeds in rates.values() for one in seeds.values())
        tokens = tokens_of_all({one.run: one for one in every})
        best: dict[str, Mapping[str, KeptRun]] = {}
        for method, rates in found.items():  # the best rate is one of those with the most seeds
            if (most := max(map(len, rates.values()))) > 1:
                tried = (seeds for seeds in rates.values() if len(seeds) == most)
                best[method] = min(tried, key=lambda seeds: validation_loss([*seeds.values()]))
        plain = {method: validation_loss([*seeds.values()]) for method, seeds in best.items() if is_plain(method)}
        if not plain:
            continue
        baseline = min(plain, key=lambda method: plain[method])
        for method, seeds in best.items():
            common = sorted(seeds.keys() & best[baseline].keys())
            if method != baseline and len(common) > 1:
                every_row = slice(None)
                new, old = (losses_of([one[seed] for seed in common], every_row) for one in (seeds, best[baseline]))
                pair, variances = (methods[method], methods[baseline]), percent_variances(new, old, tokens)
                spreads.append(MeasuredSpread(*pair, task, len(common), len(tokens), *variances))
    return spreads


def _power(task: str, spread: MeasuredSpread, rows: int, seeds: int) -> TaskPower:
    smallest = spread.smallest(rows, seeds)
    both = _first(lambda n: spread.smallest(rows * n // seeds, n) <= smallest / 2, seeds)
    assert both is not None
    return TaskPower(
        task=task,
        method=spread.method,
        baseline=spread.baseline,
        measured_on=spread.task,
        measured_seeds=spread.seeds,
        measured_rows=spread.rows,
        seed_deviation=math.sqrt(spread.of_seed),
        row_deviation=math.sqrt(spread.of_row),
        rows=rows,
        seeds=seeds,
        smallest=smallest,
        rows_to_halve=_first(lambda n: spread.smallest(n, seeds) <= smallest / 2, rows),
        seeds_to_halve=_first(lambda n: spread.smallest(rows, n) <= smallest / 2, seeds),
        factor_to_halve=both / seeds,
    )


def _first(suffices: Callable[[int], bool], start: int) -> int | None:
    """Smallest number from `start` that suffices, where all larger ones do too; None if MOST does not."""
    if not suffices(MOST):
        return None
    return start + bisect.bisect_left(range(start, MOST), True, key=suffices)
