"""Scores of a study's adapters on a benchmark of `loraover eval`.

The folder `scores` of a study has one file of `loraover eval` for each task and each way of asking, so that a report
never shows answers to other questions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from loraover.checkpoint.carried_files import adapter_digest
from loraover.common.errors import ConfigError, LoraOverError
from loraover.common.strict_json import read_json
from loraover.models.load import load_tokenizer, resolve_model
from loraover.sources.verb import perform
from loraover_lab.evaluation import TASKS
from loraover_lab.evaluation.results import CORRELATIONS, Evaluation, ModelResult
from loraover_lab.evaluation.run import BASE_MODEL, evaluate
from loraover_lab.study.grid import Run
from loraover_lab.study.kept_runs import KEPT_FILE
from loraover_lab.study.outcome import RunOutcome
from loraover_lab.study.report import Scores
from loraover_lab.study.request import StudyRequest
from loraover_lab.study.tuning import chosen_runs

FOLDER = "scores"


def check_benchmark(grid: Sequence[Run], request: StudyRequest) -> None:
    """Check before the first run that the benchmark of a study can be asked.

    Args:
        grid: All runs of the study.
        request: What the study was asked for.

    Raises:
        ConfigError: The benchmark lacks an option, such as its judge, or cannot be asked of these models.
        DataError: Its questions cannot be read.
    """
    if request.benchmark is None or request.report_only:
        return
    if any(run.recipe.model_init.quantization for run in grid):
        benchmark = StudyRequest.named("benchmark")
        raise ConfigError(f"{benchmark} asks models that are not quantised; leave out model_init.quantization.")
    task, asked = TASKS[request.benchmark], request.evaluation("", (), None)
    models = dict.fromkeys((run.recipe.model, run.recipe.model_revision) for run in grid)
    tokenizers = [load_tokenizer(resolve_model(*model)) for model in models]
    try:
        task.check(asked)
        task.read(asked)
        for tokenizer in tokenizers:
            task.settings(asked, tokenizer)
    except LoraOverError as error:
        raise type(error)(f"{error} Options of the benchmark: {StudyRequest.named('benchmark_settings')}.") from error


def score_runs(
    grid: Sequence[Run], outcomes: Mapping[Run, RunOutcome], request: StudyRequest
) -> tuple[Mapping[Run, RunOutcome], Scores]:
    """Put the benchmark's questions to every adapter that judges, or with `report_only` read the answers.

    Answers that the study's folder holds are not asked for again, but for those on which the benchmark failed, or which
    the judge left without a rating. A method that trains all weights leaves no adapter, and so has no score.

    Args:
        grid: All runs of the study.
        outcomes: Outcomes of those that are finished.
        request: What the study was asked for; without a benchmark, nothing is done.

    Returns:
        The outcomes with scores, and what the scores are of.

    Raises:
        ConfigError: An adapter is missing, as of a run that another study trained.
        LoraOverError: The benchmark fails on the base model.
    """
    if request.benchmark is None:
        return outcomes, Scores()
    scored = {run: outcome.model_copy(update={"score": None}) for run, outcome in outcomes.items()}
    untrained: dict[str, float] = {}
    unrated = 0
    by_task: dict[str, list[Run]] = {}
    for run in chosen_runs(grid, outcomes, request.tuning_seeds):
        if run.recipe.method != "full":
            by_task.setdefault(run.task, []).append(run)
    for task, runs in by_task.items():
        file = scores_file(request, task)
        results = _kept(file)
        left = [run for run in runs if not _is_finished(results.get(_adapter(run)), run, request)]
        if left and not request.report_only:
            _ask(left, outcomes, file, request)
            results = _kept(file)
        for run in runs:
            result = results.get(_adapter(run), ModelResult(name=_adapter(run), failure="it was not asked"))
            if result.failure is not None:
                request.report.line(f"{run.name} has no score of {request.benchmark}: {result.failure}")
            scored[run] = scored[run].model_copy(update={"score": score_of(result)})
            unrated += _unrated(result)
        if BASE_MODEL in results and (score := score_of(results[BASE_MODEL])) is not None:
            untrained[task] = score
    return scored, Scores(benchmark=request.benchmark, untrained=untrained, unrated=unrated)


def scores_file(request: StudyRequest, task: str) -> Path:
    """Return the file of a task's scores, whose name has a digest of the benchmark and of its options."""
    options = {k: v for k, v in (request.benchmark_settings or {}).items() if k != "judge_key_variable"}
    asked = sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()[:8]
    folder: Path = request.output / FOLDER
    return folder / f"{task}.{request.benchmark}-{asked}.json"


def _adapter(run: Run) -> str:
    """Name of a run's adapter in the study's folder."""
    return f"{run.folder}/adapter"


def _kept(file: Path) -> dict[str, ModelResult]:
    """Read the results of a file, the base model's first; those of adapters by their names in the study's folder."""
    results = read_json(file, Evaluation).results if file.is_file() else []
    return {"/".join(Path(result.name).parts[-6:]): result for result in reversed(results)}  # the newest come first


def _is_finished(result: ModelResult | None, run: Run, request: StudyRequest) -> bool:
    """Whether an adapter, as the study's folder has it, has its score; one that was deleted is not asked again."""
    if result is None or result.failure is not None:
        return False
    folder = request.output / _adapter(run)
    return not folder.is_dir() or (not _unrated(result) and result.sha256 == adapter_digest(folder))


def _ask(runs: Sequence[Run], outcomes: Mapping[Run, RunOutcome], file: Path, request: StudyRequest) -> None:
    """Put the questions to the adapters of one task that have not answered them yet."""
    first, benchmark = runs[0], StudyRequest.named("benchmark")
    folders = [request.output / _adapter(run) for run in runs]
    if lacking := [folder for folder in folders if not folder.is_dir()]:
        raise ConfigError(
            f"{benchmark}: {lacking[0]} is missing, so it cannot be asked. To train it again, delete its line in "
            f"{request.output / KEPT_FILE}, and leave out {StudyRequest.named('reuse')}."
        )
    commit = outcomes[first].model_revision
    model = first.recipe.model if commit is None else f"{first.recipe.model.partition('@')[0]}@{commit}"
    request.report.line(f"{first.task}: {request.benchmark} of {len(runs)} adapters")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        perform(evaluate, request.evaluation(model, [str(folder) for folder in folders], file))
    except ConfigError as error:
        if not file.exists():
            raise
        raise ConfigError(f"{error} In a study, move {file} away instead, to have all adapters asked anew.") from error


def score_of(result: ModelResult) -> float | None:
    """Return a model's first measure, a share in per cent; None where the benchmark failed."""
    for name, value in result.measures.items():
        is_share = result.interval is not None or name in CORRELATIONS
        return 100 * value if is_share else value
    return None


def _unrated(result: ModelResult) -> int:
    """Count the answers that a judge should have rated and has not."""
    return result.missing if result.failure is None and result.interval is None else 0
