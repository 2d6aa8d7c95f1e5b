"""Results of a study: `study.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Literal, TypeVar

import numpy as np
from pydantic import Field

from loraover.common.atomic_output import publish_file
from loraover.common.errors import ConfigError
from loraover.common.multiple_testing import holm
from loraover.common.strict_json import StrictModel, read_json
from loraover_lab.study.analysis import Difference, Halves, Losses, RateSensitivity, difference, mean_loss
from loraover_lab.study.grid import Run, is_plain
from loraover_lab.study.outcome import RunOutcome
from loraover_lab.study.request import StudyRequest
from loraover_lab.study.tuning import by_method, losses_of, tokens_of, tune

RULE_FILE = "rule.json"


class Rule(StrictModel):
    """On how many tasks LoRA-Over has to be better, and when that was decided."""

    schema_version: Literal[1] = 1
    required: int = Field(description="Number of tasks on which the loss has to be below a tuned plain LoRA's.")
    tasks: int = Field(description="Number of tasks of the study.")
    finished_before: int = Field(
        description="Number of the study's runs that had finished when the rule was written down, reused ones included."
    )

    @property
    def was_first(self) -> bool:
        """Whether the rule was written down before the first run had finished."""
        return self.finished_before == 0

    def __str__(self) -> str:
        runs = "the first run" if self.finished_before == 1 else f"{self.finished_before} of the runs"
        when = "fixed before the first run" if self.was_first else f"written down after {runs} had finished"
        return (
            f"LoRA-Over counts as better if its loss is below a tuned plain LoRA's on at least {self.required} of "
            f"{self.tasks} task{'' if self.tasks == 1 else 's'}; this rule was {when}."
        )


def fixed_rule(request: StudyRequest, finished: int) -> Rule:
    """Return the rule of a study, and write it down if the study is to train and its folder has none."""
    file, tasks = request.output / RULE_FILE, len(request.tasks)
    if not file.is_file():
        rule = Rule(required=request.required or tasks, tasks=tasks, finished_before=finished)
        if not request.report_only:
            publish_file(file, lambda draft: draft.write_text(rule.model_dump_json(indent=1) + "\n"), parents=True)
        return rule
    rule = read_json(file, Rule)
    asked = (rule.required if request.required is None else request.required, tasks)
    if asked != (rule.required, rule.tasks):
        required = StudyRequest.named("required")
        raise ConfigError(
            f"{file}: the study was begun with {required} {rule.required} of {rule.tasks} tasks, found {asked[0]} of "
            f"{asked[1]}. A rule that is changed after runs have been read proves nothing; begin a new study."
        )
    return rule


ALPHA = 0.05
FEWEST_EXAMPLES = 20
"""Test examples below which no difference counts, since the intervals take means of examples to be normal.

Where two equal methods differ by lognormal amounts (sigma 1) per example, a study of five seeds calls one of them
better in 18 of 100 cases with 6 examples, in 13 with 20 and in 9 with 50; 2.5 are meant.
"""
MOST_DIGITS = 8

Number = TypeVar("Number", int, float)


class MethodResult(StrictModel):
    """Result of a method on a task, at the rate tuned for it."""

    method: str = Field(description="Method as the user named it.")
    rate: float = Field(description="Learning rate tuned for it.")
    test_loss: float = Field(description="Nats per token on the test half, mean over seeds.")
    deviation: float | None = Field(description="Standard deviation of that loss over seeds; None with one seed.")
    difference: Difference | None = Field(description="Difference to the baseline; None for the baseline.")
    sensitivity: RateSensitivity = Field(description="How the loss depends on the learning rate.")
    trained_parameters: int = Field(description="Numbers trained: cores, and matrices without cores.")
    served_parameters: int = Field(description="Numbers in A and B.")
    served_rank: int | None = Field(None, description="Largest rank of a module as served; None: not known.")
    served_bytes: int | None = Field(None, description="Bytes of A and B as served; None: not known.")
    step_seconds: float | None = Field(description="Median seconds of an optimizer step; None: no step was timed.")
    peak_bytes: int | None = Field(description="Largest memory of a run, in bytes; None: not measured.")
    update_norm: float | None = Field(description="Frobenius norm of the change of B A, mean over seeds.")
    step_norm: float | None = Field(description="Norm of the change of B A in one step, mean over logged steps.")
    fold_error: float | None = Field(description="Largest relative Frobenius error of a stored A or B.")
    score: float | None = Field(None, description="Score, mean over seeds; None: not measured for all of them.")
    score_deviation: float | None = Field(None, description="Standard deviation of the score; None with one seed.")


class Scores(StrictModel):
    """Benchmark that the scores of a study come from."""

    benchmark: str | None = Field(None, description="Benchmark; None: right answers to the held-out rows.")
    untrained: dict[str, float] = Field(default_factory=dict, description="Base model's score, by task.")
    unrated: int = Field(0, description="Answers without a rating by the judge, which no score counts.")
    choices: list[str] = Field(
        default_factory=list, description="Choices in a table of the paper where its abstract is silent."
    )


class TaskResult(StrictModel):
    """Every method on one task."""

    task: str = Field(description="Name of the recipe.")
    examples: int = Field(description="Number of examples in the test half.")
    baseline: str | None = Field(description="Plain LoRA with the lowest validation loss; None: every one failed.")
    rulers: list[str] = Field(
        default_factory=list, description="Methods that are shown, but belong neither to the baselines nor the verdict."
    )
    methods: list[MethodResult] = Field(description="Results of the methods that have one.")
    failed: list[str] = Field(description="Methods without a rate at which every run ended well.")
    failures: list[str] = Field(description="Each failed run's folder and reason.")
    names: dict[str, str] = Field(default_factory=dict, description="Short name of each method that has one.")

    def shown(self, method: str | None) -> str:
        """Return the name of a method in reports."""
        return self.names.get(str(method), str(method))

    def named(self, method: str) -> str:
        """Return the name of a method; rulers are marked."""
        return f"{self.shown(method)} (ruler)" if method in self.rulers else self.shown(method)


class StudyAnswer(StrictModel):
    """Answer of a command of studies, with its origin."""

    schema_version: int = 1
    command: str = Field(description="Command line.")
    versions: dict[str, str] = Field(description="Versions of Python and of the libraries.")
    date: str = Field(description="Day of the answer, in UTC.")

    @property
    def exit_code(self) -> int:
        """Exit code of the command, which is 0."""
        return 0


class StudyReport(StudyAnswer):
    """Contents of `study.json`."""

    rule: Rule = Field(description="When LoRA-Over counts as better.")
    is_whole: bool = Field(description="Whether every run of the study has finished.")
    seeds: int = Field(description="Number of seeds whose runs have all finished; the figures are theirs.")
    tuning_seeds: int | None = Field(
        None, description="Number of these seeds that chose the learning rates; None: all."
    )
    runs: int = Field(description="Number of finished runs.")
    tasks: list[TaskResult] = Field(description="Results on each task.")
    words: list[str] = Field(description="A sentence for each comparison.")
    scores: Scores = Field(default_factory=Scores, description="Benchmark that the methods' scores come from.")
    hardware: str = Field(description="Machines that trained.")

    @property
    def names(self) -> dict[str, str]:
        """Methods by the short names that they have on any task."""
        return {name: method for task in self.tasks for method, name in task.names.items()}


def task_results(
    runs: Sequence[Run], outcomes: Mapping[Run, RunOutcome], seeds: int, tuning_seeds: int | None = None
) -> list[TaskResult]:
    """Compare methods at their chosen rates."""
    tuning = seeds if tuning_seeds is None else tuning_seeds
    found = []
    for task, methods in by_method(runs).items():
        every = [run for mine in methods.values() for run in mine]
        tokens = tokens_of(every, outcomes)
        test = Halves(len(tokens)).test
        rates = {method: tune(mine, outcomes, tuning, tokens) for method, mine in methods.items()}
        tuned = {method: rate for method, rate in rates.items() if rate is not None}
        rulers = [method for method, mine in methods.items() if mine[0].is_ruler]
        plain = {m: min(rate.losses.values()) for m, rate in tuned.items() if is_plain(m) and m not in rulers}
        baseline = min(plain, key=lambda method: plain[method], default=None)
        chosen = {
            method: [outcomes[run] for run in methods[method] if run.rate == rate.best_rate and run.seed < seeds]
            for method, rate in tuned.items()
        }
        reference = None if baseline is None else losses_of(chosen[baseline], test)
        result = TaskResult(
            task=task,
            examples=len(tokens[test]),
            baseline=baseline,
            rulers=rulers,
            methods=[_method(m, tuned[m], chosen[m], test, None if m == baseline else reference) for m in tuned],
            failed=[method for method in methods if method not in tuned],
            failures=[f"{run.folder}: {outcomes[run].failure}" for run in every if outcomes[run].failure is not None],
            names={method: mine[0].short for method, mine in methods.items() if mine[0].short is not None},
        )
        found.append(result)
    return _adjusted(found)


def _method(
    method: str,
    tuned: RateSensitivity,
    outcomes: Sequence[RunOutcome],
    half: slice,
    reference: Losses | None,
) -> MethodResult:
    losses, tokens = losses_of(outcomes, half), np.array(outcomes[0].tokens[half], dtype=np.float64)
    each = [mean_loss(row[None], tokens) for row in losses]
    norms = _known(outcome.step_norm for outcome in outcomes)
    updates = _known(outcome.update_norm for outcome in outcomes)
    errors = _known(outcome.fold_error for outcome in outcomes)
    seconds = _known(outcome.step_seconds for outcome in outcomes)
    scores = _known(outcome.score for outcome in outcomes)
    is_scored = len(scores) == len(outcomes)
    paired = None if reference is None or len(losses) < 2 else difference(losses, reference, tokens)
    return MethodResult(
        method=method,
        rate=tuned.best_rate,
        test_loss=fmean(each),
        deviation=stdev(each) if len(each) > 1 else None,
        difference=paired,
        sensitivity=tuned,
        trained_parameters=outcomes[0].trained_parameters,
        served_parameters=outcomes[0].served_parameters,
        served_rank=max(_known(outcome.served_rank for outcome in outcomes), default=None),
        served_bytes=max(_known(outcome.served_bytes for outcome in outcomes), default=None),
        step_seconds=median(seconds) if seconds else None,
        peak_bytes=max(_known(outcome.peak_bytes for outcome in outcomes), default=None),
        update_norm=fmean(updates) if updates else None,
        step_norm=fmean(norms) if norms else None,
        fold_error=max(errors) if errors else None,
        score=fmean(scores) if is_scored else None,
        score_deviation=stdev(scores) if is_scored and len(scores) > 1 else None,
    )


def _known(values: Iterable[Number | None]) -> list[Number]:
    return [value for value in values if value is not None]


def _adjusted(tasks: Sequence[TaskResult]) -> list[TaskResult]:
    """Apply Holm's correction over tasks to each method's p-values; a task on which the method failed counts too."""
    compared = [(t.task, r.method, r.difference.p) for t in tasks for r in t.methods if r.difference is not None]
    p_values: dict[tuple[str, str], float] = {}
    for method in {method for _, method, _ in compared}:
        mine = [(task, p) for task, its, p in compared if its == method]
        failed = sum(method in task.failed and task.baseline is not None for task in tasks)
        for (task, _), p in zip(mine, holm([p for _, p in mine] + [1.0] * failed), strict=False):
            p_values[task, method] = p

    def with_p(task: TaskResult, result: MethodResult) -> MethodResult:
        if result.difference is None:
            return result
        found = result.difference.model_copy(update={"p": p_values[task.task, result.method]})
        return result.model_copy(update={"difference": found})

    return [task.model_copy(update={"methods": [with_p(task, each) for each in task.methods]}) for task in tasks]


def words(tasks: Sequence[TaskResult]) -> list[str]:
    """Compare each method on each task in a sentence."""
    lines = []
    for task in tasks:
        if task.baseline is None:
            lines.append(f"{task.task}: every plain LoRA failed at every rate, so nothing is compared.")
        compared = [result for result in task.methods if result.method not in task.rulers]
        lines += [_sentence(task, result) for result in compared if result.difference is not None]
    return lines


def is_over(task: TaskResult, method: str) -> bool:
    """Whether a method is LoRA-Over, and no ruler."""
    return method.startswith("lora-over") and method not in task.rulers


Standing = Literal["better", "worse", "cannot be told apart", "not shown"]


def standing(task: TaskResult, result: MethodResult) -> tuple[Standing, str]:
    """Return how a method's loss stands beside the baseline's, and why a difference beyond chance shows nothing.

    The loser has to be tuned: a baseline whose best rate is at an end of the sweep may do better beyond it, and so may
    a method that seems worse.
    """
    found = result.difference
    assert found is not None
    if found.p > ALPHA or found.mean == 0:
        return "cannot be told apart", ""
    if task.examples < FEWEST_EXAMPLES:
        return "not shown", f"it has {task.examples} test examples, and {FEWEST_EXAMPLES} are needed"
    loser = result if found.mean > 0 else next(one for one in task.methods if one.method == task.baseline)
    if not loser.sensitivity.is_bracketed:
        return "not shown", f"the sweep did not bracket the best rate of {task.shown(loser.method)}"
    return "better" if found.mean < 0 else "worse", ""


def signed(found: Sequence[float], digits: int) -> list[str]:
    """Return a difference and the ends of its interval, with more digits where an end would look like zero."""
    while digits < MOST_DIGITS and any(end != 0 == round(end, digits) for end in found[1:]):
        digits += 1
    return [f"{value:+z.{digits}f}" for value in found]


def _sentence(task: TaskResult, result: MethodResult) -> str:
    assert result.difference is not None
    mean, low, high = signed((result.difference.mean, *result.difference.interval), 4)
    figures = f"{mean} nats per token [{low}, {high}], p {result.difference.p:.2g} after Holm"
    method, baseline = task.shown(result.method), task.shown(task.baseline)
    word, doubt = standing(task, result)
    side = "lower" if result.difference.mean < 0 else "higher"
    verdict = {
        "better": f"{method} beats {baseline}, each at its own tuned rate",
        "worse": f"{method} does not beat {baseline}: it is worse, each at its own tuned rate",
        "cannot be told apart": f"{method} and {baseline} cannot be told apart, each at its own tuned rate",
        "not shown": f"{method}'s loss is {side} than {baseline}'s, which shows nothing on this task: {doubt}",
    }[word]
    at_end = [
        task.shown(other.method)
        for other in task.methods
        if other.method in (result.method, task.baseline) and not other.sensitivity.is_bracketed
    ]
    edge = f" The best rate of {' and of '.join(at_end)} is at an end of the sweep, which should be widened."
    return f"{task.task}: {verdict}. The difference is {figures}.{edge if at_end else ''}"
