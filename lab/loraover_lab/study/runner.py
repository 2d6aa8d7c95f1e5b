"""Run a study's grid, on this machine or with Ray, score its adapters, and report what is finished.

With a benchmark of `loraover eval`, the folder `scores` of a study has one file of that command for each task and each
way of asking, so that a report never shows answers to other questions.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from hashlib import sha256
from pathlib import Path
from typing import Any

from loraover.checkpoint.carried_files import adapter_digest
from loraover.common.atomic_output import publish_text
from loraover.common.errors import ConfigError, LoraOverError
from loraover.common.provenance import environment, today
from loraover.common.strict_json import read_json
from loraover.models.load import load_tokenizer, resolve_model
from loraover.reporting.html_page import FIGURES
from loraover.sources.verb import perform, verb
from loraover.training.on_ray import ray_cluster
from loraover.training.recipe import Recipe
from loraover_lab.evaluation import TASKS
from loraover_lab.evaluation.results import CORRELATIONS, Evaluation, ModelResult
from loraover_lab.evaluation.run import BASE_MODEL, evaluate
from loraover_lab.study.grid import Run, grid_of
from loraover_lab.study.outcome import KEPT_FILE, RunOutcome, check_held_out, execute, finished, keep
from loraover_lab.study.report import Rule, Scores, StudyReport, fixed_rule, task_results, words
from loraover_lab.study.request import StudyRequest, table_choices
from loraover_lab.study.show import HTML_FILE, REPORT_FILE, TABLE_FILE, hours_text, to_markdown, to_page
from loraover_lab.study.tuning import chosen_runs, hours_left, plan_runs, validation_loss

FOLDER = "scores"


def check_benchmark(grid: Sequence[Run], request: StudyRequest) -> None:
    """Check before the first run that the benchmark of a study can be run."""
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
    """Put the benchmark's questions to the adapters that are compared, or with `report_only` read the answers.

    Answers that the study's folder holds are not asked for again, but for those on which the benchmark failed, or which
    the grader left without a rating. A method that trains all weights leaves no adapter, and so has no score.
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
        left = []
        for run in runs:
            known, folder = results.get(_adapter(run)), request.output / _adapter(run)
            # An adapter that was deleted is not asked again.
            if (
                known is None
                or known.failure is not None
                or (folder.is_dir() and (_unrated(known) or known.sha256 != adapter_digest(folder)))
            ):
                left.append(run)
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
    """Count the answers that a grader should have rated and has not."""
    return result.missing if result.failure is None and result.interval is None else 0


@verb(StudyRequest)
def run_study(request: StudyRequest) -> StudyReport:
    """Compare training methods, each at its best learning rate.

    Every combination of recipe, method, rate and seed is trained in a process; with `tuning_seeds`, further seeds are
    trained at the chosen rates only. Runs that are finished are kept, so the same call continues a study that was
    stopped. `study.json`, `study.md`, `study.html` and its figures are written to `output`.

    A method is a name of `loraover_lab.study.grid.METHOD_SETTINGS`, with settings where wanted, such as
    "lora-over:schedule=dynamic:budget={fraction: 0.25}". A table of the paper, such as "paper-gsm8k", takes the place
    of recipes; other arguments override what it fixes. `lr_sweep` may also map such names as "lora", "demo" or
    "demo/lora" to their rates, and "" to those of all others.

    Returns:
        The contents of `study.json`.

    Raises:
        ConfigError: The request is not a study, or not the one that was begun in `output`.
        LoraOverError: A run failed for another reason than its rate or its size, or no seed is finished yet.
    """
    for name, function in (("power", "predict_power"), ("plan", "plan_study")):
        if request.given(name):
            asked = StudyRequest.named(name)
            raise ConfigError(
                f"{asked} asks what a study would see or need, and run_study trains one; call {function}."
            )
    command, choices, request = request.command(), table_choices(request.table), request.whole()
    folder = request.output
    grid = grid_of(request)
    check_benchmark(grid, request)
    outcomes = finished(grid, folder, request.reuse)
    rule = fixed_rule(request, len(outcomes))
    if not request.report_only:
        outcomes = run_grid(grid, request)
    scored, scores = score_runs(grid, outcomes, request)
    scores = scores.model_copy(update={"choices": choices})
    found = make_report(grid, scored, rule, command, request.tuning_seeds, scores)
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    for path, content in {
        folder / REPORT_FILE: found.model_dump_json(indent=1) + "\n",
        folder / TABLE_FILE: to_markdown(found),
        **to_page(found).files(folder / HTML_FILE),
    }.items():
        publish_text(path, content)
    return found


def run_grid(grid: Sequence[Run], request: StudyRequest) -> dict[Run, RunOutcome]:
    """Train the runs that a study needs and are not finished, and read the others."""
    outcomes = finished(grid, request.output, request.reuse)
    seconds: dict[str, list[float]] = {}
    plan = plan_runs(grid, outcomes, request.tuning_seeds)
    if request.ray is None:  # whose workers check their runs; they may have other files than this machine
        recipes = (run.recipe for run in plan.runs if run not in outcomes)
        for recipe in {(one.data.model_dump_json(), one.evaluation.examples): one for one in recipes}.values():
            check_held_out(recipe)
    # Steps times a step's time, without loading and evaluation, whose time is not kept.
    trained: dict[str, list[float]] = {}
    for run, outcome in outcomes.items():
        steps = run.recipe.training.max_steps
        if steps is not None and outcome.failure is None and outcome.step_seconds is not None:
            trained.setdefault(run.task, []).append(steps * outcome.step_seconds)
    left_now = plan.left(outcomes)
    begin = f"{left_now.total()} runs to do, {len(outcomes)} finished already"
    request.report.line(begin + _estimate(hours_left(left_now, trained, request.jobs)))
    with request.report.task("runs", plan.total) as advance:
        advance(len(outcomes))
        while left := [run for run in plan.runs if run not in outcomes]:
            for run, outcome, duration in _executed(left, request):
                outcomes[run] = outcome
                keep(request.output, {run: outcome})
                advance(len(outcomes))
                if duration is not None and outcome.failure is None:
                    seconds.setdefault(run.task, []).append(duration)
                plan = plan_runs(grid, outcomes, request.tuning_seeds)
                hours = hours_left(plan.left(outcomes), seconds, request.jobs)
                # Of the losses, only that of the validation half: nobody shall see the other one yet.
                ending = outcome.failure or f"validation loss {validation_loss([outcome]):.4f}"
                ended = f"{run.task}, {run.method}, rate {run.rate:g}, seed {run.seed}: {ending}"
                request.report.line(f"{len(outcomes)}/{plan.total} {ended}{_estimate(hours)}")
    return outcomes


def _estimate(hours: float | None) -> str:
    """Say how long the remaining runs take."""
    if not hours:
        return ""
    return f"; about {hours_text(hours)} left"


def _executed(runs: Sequence[Run], request: StudyRequest) -> Iterator[tuple[Run, RunOutcome, float | None]]:
    """Yield each run with its outcome and its seconds, which Ray's workers do not measure."""
    if request.ray is not None:
        with ray_cluster(request.ray) as ray:
            gpus = 1 if ray.cluster_resources().get("GPU") else 0
            remote = ray.remote(num_cpus=1, num_gpus=gpus)(_execute_anywhere)
            waiting = {remote.remote(run.recipe.model_dump(mode="json")): run for run in runs}
            while waiting:
                (done,), _ = ray.wait(list(waiting), num_returns=1)
                yield waiting.pop(done), RunOutcome.model_validate_json(ray.get(done)), None
        return
    threads = max(1, (os.cpu_count() or 1) // request.jobs)

    def timed(run: Run) -> tuple[Run, RunOutcome, float]:
        started = time.perf_counter()
        outcome = execute(run.recipe, request.output / run.folder, threads)
        return run, outcome, time.perf_counter() - started

    if request.jobs == 1:
        yield from map(timed, runs)
        return
    with ThreadPoolExecutor(request.jobs) as pool:
        futures = [pool.submit(timed, run) for run in runs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _execute_anywhere(recipe: Mapping[str, Any]) -> str:
    """Train in a temporary folder of a worker of Ray, and return the outcome as JSON."""
    import ray

    worker = str(ray.get_runtime_context().get_worker_id())
    with tempfile.TemporaryDirectory(prefix="loraover-study-") as scratch:
        outcome = execute(Recipe.model_validate(recipe), Path(scratch) / "run", threads=1)
    return outcome.model_copy(update={"worker": worker}).model_dump_json()


def make_report(
    grid: Sequence[Run],
    outcomes: Mapping[Run, RunOutcome],
    rule: Rule,
    command: str,
    tuning_seeds: int | None = None,
    scores: Scores | None = None,
) -> StudyReport:
    """Report on the seeds whose runs have all finished."""
    tuning = len({run.seed for run in grid}) if tuning_seeds is None else tuning_seeds
    plan = plan_runs(grid, outcomes, tuning)
    seeds = 0
    while (mine := [run for run in plan.runs if run.seed == seeds]) and all(run in outcomes for run in mine):
        seeds += 1
    if not seeds:
        raise LoraOverError(
            "no seed has all of its runs finished yet, so there is nothing to compare; continue the study first."
        )
    compared = [run for run in grid if run in outcomes and (run.seed < seeds or seeds >= tuning)]
    tasks = task_results(compared, outcomes, seeds, min(tuning, seeds))
    return StudyReport(
        rule=rule,
        is_whole=not plan.left(outcomes),
        seeds=seeds,
        tuning_seeds=tuning if tuning < seeds else None,
        runs=len(outcomes),
        tasks=tasks,
        words=words(tasks),
        scores=scores or Scores(),
        command=command,
        versions=environment("scipy", "transformers"),
        hardware="; ".join(sorted({found.hardware for found in outcomes.values() if found.hardware}))
        or "unknown hardware",
        date=today(),
    )
