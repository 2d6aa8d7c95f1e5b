"""Scores of a study's adapters on a benchmark of `loraover eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from loraover.common.errors import ConfigError, LoraOverError
from loraover.common.strict_json import read_json
from loraover.common.verb import perform
from loraover.evaluation import TASKS
from loraover.evaluation.results import CORRELATIONS, Evaluation, ModelResult
from loraover.evaluation.run import evaluate, options_of
from loraover.study.grid import Run
from loraover.study.kept_runs import keep
from loraover.study.outcome import RunOutcome
from loraover.study.request import StudyRequest
from loraover.study.tuning import chosen_runs

FOLDER = "scores"
"""Folder of the evaluations in a study's folder, one file a task."""


def check_benchmark(request: StudyRequest) -> None:
    """Check before the first run that the benchmark of a study can be asked.

    Raises:
        ConfigError: It lacks an option, such as its judge.
        DataError: Its questions cannot be read.
    """
    if request.benchmark is None or request.report_only:
        return
    task, options = TASKS[request.benchmark], options_of(request.evaluation("", (), None))
    try:
        task.check(options)
        task.read(options)
    except LoraOverError as error:
        raise type(error)(f"{error} Options of the benchmark: {StudyRequest.named('benchmark_settings')}.") from error


def score_runs(grid: Sequence[Run], outcomes: Mapping[Run, RunOutcome], request: StudyRequest) -> dict[Run, RunOutcome]:
    """Put the benchmark's questions to every adapter that judges.

    Answers that the study's folder holds are not asked for again. A method that trains all weights leaves no adapter,
    and an adapter on which the benchmark failed has no score.

    Args:
        grid: All runs of the study.
        outcomes: Outcomes of those that are finished.
        request: What the study was asked for; without a benchmark, nothing is done.

    Returns:
        The outcomes, with scores.

    Raises:
        ConfigError: An adapter is missing, as of a run that another study trained.
        LoraOverError: The benchmark fails on the base model.
    """
    scored = dict(outcomes)
    if request.benchmark is None:
        return scored
    by_task: dict[str, list[Run]] = {}
    for run in chosen_runs(grid, outcomes, request.tuning_seeds):
        if run.recipe.method != "full":
            by_task.setdefault(run.task, []).append(run)
    for task, runs in by_task.items():
        if all(outcomes[run].score is not None for run in runs):
            continue
        folders = [request.output / run.folder / "adapter" for run in runs]
        if lacking := [folder for folder in folders if not folder.is_dir()]:
            benchmark = StudyRequest.named("benchmark")
            raise ConfigError(f"{benchmark}: {lacking[0]} is missing; train the runs in this study's own folder.")
        request.report.line(f"{task}: {request.benchmark} of {len(runs)} adapters")
        file = request.output / FOLDER / f"{task}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        asked = request.evaluation(runs[0].recipe.model, [str(folder) for folder in folders], file)
        _, *results = perform(evaluate, asked).results
        for run, result in zip(runs, results, strict=True):
            if result.failure is not None:
                request.report.line(f"{run.name} has no score: {result.failure}")
            scored[run] = outcomes[run].model_copy(update={"score": score_of(result)})
        keep(request.output, {run: scored[run] for run in runs})
    return scored


def untrained_scores(tasks: Sequence[str], folder: Path) -> dict[str, float]:
    """Return the base model's score on each task whose benchmark was run.

    Args:
        tasks: Names of the tasks.
        folder: The study's folder.
    """
    files = {task: folder / FOLDER / f"{task}.json" for task in tasks}
    found = {task: read_json(file, Evaluation).results for task, file in files.items() if file.is_file()}
    scores = {task: score_of(results[0]) for task, results in found.items() if results}
    return {task: score for task, score in scores.items() if score is not None}


def score_of(result: ModelResult) -> float | None:
    """Return a model's first measure, a share in per cent; None where the benchmark failed."""
    for name, value in result.measures.items():
        is_share = result.interval is not None or name in CORRELATIONS
        return 100 * value if is_share else value
    return None
