"""What a study found: `study.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from loraover.statistics import holm
from loraover.study.analysis import Difference, Halves, Losses, Sensitivity, difference, mean_loss, sensitivity
from loraover.study.grid import PLAIN, Run
from loraover.study.outcome import Outcome

ALPHA = 0.05
Cell = tuple[str, str, float]
"""Task, method and rate."""


class MethodResult(BaseModel):
    """One method on one task, at its own tuned rate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    rate: float
    test_loss: float = Field(description="nats per token, mean over seeds")
    deviation: float = Field(description="standard deviation over seeds")
    difference: Difference | None = Field(description="to the baseline; None for itself")
    sensitivity: Sensitivity
    trained_parameters: int
    served_parameters: int
    step_seconds: float
    peak_bytes: int
    update_norm: float | None
    step_norm: float | None
    fold_error: float | None


class TaskResult(BaseModel):
    """Every method on one task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    examples: int = Field(description="in the test half")
    baseline: str = Field(description="the plain LoRA with the lowest validation loss")
    methods: list[MethodResult]
    failures: list[str]


class StudyReport(BaseModel):
    """Contents of `study.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    is_whole: bool = Field(description="every run of the grid is finished")
    seeds: int = Field(description="that all runs are finished of")
    runs: int
    tasks: list[TaskResult]
    words: list[str] = Field(description="what the figures say")
    command: str
    versions: dict[str, str]
    hardware: str


def task_results(runs: Sequence[Run], outcomes: Mapping[Run, Outcome], seeds: int) -> list[TaskResult]:
    """Judge the runs of the first so many seeds.

    Args:
        runs: the grid.
        outcomes: of all its runs with these seeds.
    """
    found = []
    for task in dict.fromkeys(run.task for run in runs):
        mine = [run for run in runs if run.task == task and run.seed < seeds]
        found.append(_task(task, mine, outcomes))
    return _adjusted(found)


def _task(task: str, runs: Sequence[Run], outcomes: Mapping[Run, Outcome]) -> TaskResult:
    tokens = np.array(next(outcomes[run].tokens for run in runs if outcomes[run].failure is None), dtype=np.float64)
    halves = Halves(len(tokens))
    by_method: dict[str, dict[float, list[Run]]] = {}
    for run in runs:
        by_method.setdefault(run.method, {}).setdefault(run.rate, []).append(run)
    losses: dict[tuple[str, float], Losses] = {}
    tuned: dict[str, Sensitivity] = {}
    for method, by_rate in by_method.items():
        means = {}
        for rate, same in by_rate.items():
            diverged = any(outcomes[run].failure is not None for run in same)
            if not diverged:
                losses[method, rate] = np.array([outcomes[run].nats for run in same])
            means[rate] = (
                float("inf")
                if diverged
                else mean_loss(losses[method, rate][:, halves.validation], tokens[halves.validation])
            )
        if any(np.isfinite(list(means.values()))):
            tuned[method] = sensitivity(means)
    plain = [method for method in tuned if method in PLAIN]
    baseline = min(plain or tuned, key=lambda method: min(tuned[method].losses.values()))
    reference = losses[baseline, tuned[baseline].best_rate][:, halves.test]
    results = []
    for method, found in tuned.items():
        at_best = losses[method, found.best_rate][:, halves.test]
        chosen = [outcomes[run] for run in by_method[method][found.best_rate]]
        results.append(
            _method(method, found, at_best, tokens[halves.test], chosen, None if method == baseline else reference)
        )
    failures = [f"{run.folder}: {outcomes[run].failure}" for run in runs if outcomes[run].failure is not None]
    return TaskResult(
        task=task, examples=len(tokens[halves.test]), baseline=baseline, methods=results, failures=failures
    )


def _method(
    method: str,
    tuned: Sensitivity,
    losses: Losses,
    tokens: Losses,
    outcomes: Sequence[Outcome],
    reference: Losses | None,
) -> MethodResult:
    each = [mean_loss(row[None], tokens) for row in losses]
    norms = [outcome.step_norm for outcome in outcomes if outcome.step_norm is not None]
    updates = [outcome.update_norm for outcome in outcomes if outcome.update_norm is not None]
    errors = [outcome.fold_error for outcome in outcomes if outcome.fold_error is not None]
    paired = None if reference is None or len(losses) < 2 else difference(losses, reference, tokens)
    return MethodResult(
        method=method,
        rate=tuned.best_rate,
        test_loss=fmean(each),
        deviation=stdev(each) if len(each) > 1 else 0.0,
        difference=paired,
        sensitivity=tuned,
        trained_parameters=outcomes[0].trained_parameters,
        served_parameters=outcomes[0].served_parameters,
        step_seconds=float(np.median([outcome.step_seconds for outcome in outcomes])),
        peak_bytes=max(outcome.peak_bytes for outcome in outcomes),
        update_norm=fmean(updates) if updates else None,
        step_norm=fmean(norms) if norms else None,
        fold_error=max(errors) if errors else None,
    )


def _adjusted(tasks: Sequence[TaskResult]) -> list[TaskResult]:
    """Holm's correction over tasks, for each method by itself."""
    compared = [(t.task, r.method, r.difference.p) for t in tasks for r in t.methods if r.difference is not None]
    p_values: dict[tuple[str, str], float] = {}
    for method in {method for _, method, _ in compared}:
        mine = [(task, p) for task, its, p in compared if its == method]
        for (task, _), p in zip(mine, holm([p for _, p in mine]), strict=True):
            p_values[task, method] = p
    return [
        task.model_copy(
            update={"methods": [_with_p(result, p_values.get((task.task, result.method))) for result in task.methods]}
        )
        for task in tasks
    ]


def _with_p(result: MethodResult, p: float | None) -> MethodResult:
    if result.difference is None:
        return result
    return result.model_copy(update={"difference": result.difference.model_copy(update={"p": p})})


def words(tasks: Sequence[TaskResult]) -> list[str]:
    """One sentence for each task and method that has been compared."""
    return [_sentence(task, result) for task in tasks for result in task.methods if result.difference is not None]


def _sentence(task: TaskResult, result: MethodResult) -> str:
    assert result.difference is not None
    mean, (low, high) = result.difference.mean, result.difference.interval
    figures = f"{mean:+.4f} nats per token [{low:+.4f}, {high:+.4f}], p {result.difference.p:.2g} after Holm"
    if result.difference.p > ALPHA:
        verdict = f"{result.method} and {task.baseline} cannot be told apart"
    elif mean < 0:
        verdict = f"{result.method} beats {task.baseline}"
    else:
        verdict = f"{result.method} does not beat {task.baseline}: it is worse"
    edge = (
        "" if result.sensitivity.is_bracketed else "; its best rate is at an end of the sweep, which should be widened"
    )
    return f"{task.task}: {verdict}, each at its own tuned rate ({figures}){edge}."
