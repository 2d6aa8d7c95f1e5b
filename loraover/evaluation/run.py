"""Evaluate a base model and its adapters, one after another."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loraover.common.atomic_output import check_file_writable, publish_text
from loraover.common.errors import ConfigError, EngineError, LoraOverError
from loraover.common.provenance import environment, hardware
from loraover.common.strict_json import read_json
from loraover.evaluation import TASKS
from loraover.evaluation.base import Example, Options, Questions, Task
from loraover.evaluation.endpoint import Endpoint
from loraover.evaluation.results import Evaluation, ModelResult, show_evaluation, wilson_interval
from loraover.evaluation.subjects import Served, Subject, adapter_digest, in_memory
from loraover.models.load import ModelSource, load_tokenizer, resolve_model
from loraover.reporting.reporter import ConsoleReporter, Reporter

BASE_MODEL = "base"


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate.

    Args:
        model: base model, folder or hub name.
        adapters: folders, evaluated after the base model.
        endpoint: instead of models in memory.
        served: names at the endpoint, the base model's first.
        dtype: fp32, bf16 or fp16, of models in memory.
        batch_size: questions at a time.
        command: what the user typed.
    """

    task: str
    model: str
    options: Options
    adapters: tuple[Path, ...] = ()
    endpoint: Endpoint | None = None
    served: tuple[str, ...] = ()
    dtype: str = "fp32"
    batch_size: int = 8
    command: str = ""


@dataclass(frozen=True)
class _Candidate:
    """A model to come.

    Args:
        sha256: of its adapter; None of a model that cannot be recognised by its files.
    """

    name: str
    sha256: str | None
    load: Callable[[], Subject]

    @property
    def key(self) -> tuple[str, str | None]:
        """By which a result in a file is recognised."""
        return self.name, self.sha256


def evaluate(request: EvaluationRequest, output: Path | None, report: Reporter) -> Evaluation:
    """Ask the base model, then every adapter; shows what is finished at the end, at Ctrl-C too.

    Args:
        output: JSON file, written after every model. One that holds the beginning of the same evaluation is gone
            on with: adapters whose files are the same, and models of the same name at the same endpoint, are not asked
            again; answers that nobody would rate are only rated.

    Raises:
        LoraOverError: the request cannot be used, or the first model fails; a later one's failure is its result.
    """
    task, options = TASKS[request.task], request.options
    task.check(options)
    if output is not None:
        check_file_writable(output)
    source = resolve_model(request.model)
    report.line(f"base model: {source.origin}")
    questions = task.read(options)
    report.line(f"questions: {questions.origin}, {len(questions.rows)} of them")
    tokenizer = load_tokenizer(source)
    candidates = _candidates(request, source, tokenizer)
    found = _empty(request, task, source, questions, tokenizer)
    names, keys = {c.name for c in candidates}, {c.key for c in candidates}
    known = {key: result for key, result in _known(found, output).items() if key in keys or key[0] not in names}
    try:
        for candidate in candidates:
            result = known.pop(candidate.key, None)
            if result is not None and result.failure is None:
                report.line(f"{candidate.name}: finished already")
            else:
                answered = [] if result is None else result.examples
                publish = partial(_publish, output, found, list(known.values()))
                try:
                    result = _result(candidate, answered, task, questions, options, report, publish)
                except LoraOverError as error:
                    if not found.results:
                        raise
                    result = _failure(candidate, str(error), answered)
                publish(result)
            found = found.model_copy(update={"results": [*found.results, result]})
            if result.failure is not None and len(found.results) == 1:
                kept = "" if output is None else f" Its answers are kept in {output}; the same command rates them."
                raise EngineError(result.failure + kept)
    finally:
        if found.results and isinstance(report, ConsoleReporter):
            show_evaluation(found, report.console)
    return found


def _candidates(request: EvaluationRequest, source: ModelSource, tokenizer: Any) -> list[_Candidate]:
    """Everything that can be checked of the models is checked here, before the first one is asked."""
    size = request.batch_size
    if request.endpoint is not None:
        endpoint = request.endpoint
        if not request.served or request.adapters:
            raise ConfigError("--endpoint needs --endpoint-model for each model it serves, and takes no --adapter.")

        def ask(name: str) -> Callable[[], Subject]:
            return lambda: Served(endpoint, name, tokenizer, source.location, size)

        return [_Candidate(name, None, ask(name)) for name in request.served]
    if request.served:
        raise ConfigError("--endpoint-model names models of an --endpoint; which one?")

    def load(adapter: Path | None) -> Callable[[], Subject]:
        return lambda: in_memory(source, tokenizer, adapter, dtype=request.dtype, batch_size=size)

    adapters = [_Candidate(str(adapter), adapter_digest(adapter), load(adapter)) for adapter in request.adapters]
    return [_Candidate(BASE_MODEL, None, load(None)), *adapters]


def _empty(
    request: EvaluationRequest, task: Task, source: ModelSource, questions: Questions, tokenizer: Any
) -> Evaluation:
    options = request.options
    engine = f"PyTorch, {request.dtype}" if request.endpoint is None else f"endpoint {request.endpoint.url}"
    settings = {
        "engine": engine,
        "answers": "greedy",
        "new tokens": str(options.max_new_tokens or task.max_new_tokens),
        "batch size": str(request.batch_size),
    }
    return Evaluation(
        task=request.task,
        model=request.model,
        model_origin=source.origin,
        data_origin=questions.origin,
        data_sha256=hashlib.sha256(json.dumps(questions.rows, sort_keys=True).encode()).hexdigest(),
        questions=len(questions.rows),
        is_right_or_wrong=task.is_right_or_wrong,
        settings=settings | task.settings(options, tokenizer),
        versions=environment(*task.packages),
        hardware=hardware(),
        command=request.command,
    )


def _known(wanted: Evaluation, output: Path | None) -> dict[tuple[str, str | None], ModelResult]:
    """Results of the same evaluation, by name and digest: those that are finished, or have answers at least."""
    if output is None or not output.exists():
        return {}
    begun = read_json(output, Evaluation)
    before, now = _identity(begun), _identity(wanted)
    if not any(result.measures for result in begun.results):
        for settings in (before["settings"], now["settings"]):
            settings.pop("judge", None)  # nothing depends on it yet: another judge may rate the answers
    changed = [key for key in now if before[key] != now[key]]
    if changed:
        raise ConfigError(f"{output}: holds another evaluation ({', '.join(changed)} differ); name a new file.")
    return {(result.name, result.sha256): result for result in begun.results if result.examples}


def _identity(evaluation: Evaluation) -> dict[str, Any]:
    return evaluation.model_dump(exclude={"results", "command", "hardware"})


def _publish(output: Path | None, before: Evaluation, after: list[ModelResult], result: ModelResult) -> None:
    """Write what there is: a result between those that are finished and those that are known and to come."""
    if output is not None:
        whole = before.model_copy(update={"results": [*before.results, result, *after]})
        publish_text(output, whole.model_dump_json(indent=1) + "\n")


def _result(
    candidate: _Candidate,
    answered: list[Example],
    task: Task,
    questions: Questions,
    options: Options,
    report: Reporter,
    publish: Callable[[ModelResult], None],
) -> ModelResult:
    """What one model makes of the questions.

    Args:
        answered: its answers, if it has been asked already.
        publish: takes a result that others may follow.

    Raises:
        LoraOverError: there is nothing to keep.
    """
    started = time.perf_counter()

    def keep(answers: list[Example]) -> None:
        answered[:] = answers
        publish(_failure(candidate, "its answers have not been rated", answers))

    report.line(f"{candidate.name}: answered already" if answered else f"{candidate.name}:")
    try:
        if answered:
            measured = task.rate(answered, questions, options, report)
        else:
            measured = task.measure(candidate.load(), questions, options, report, keep)
    except EngineError as error:
        if not answered:
            raise
        return _failure(candidate, str(error), answered)
    scores = [example.score for example in measured.examples]
    right = sum(score == 1 for score in scores)
    return ModelResult(
        name=candidate.name,
        sha256=candidate.sha256,
        measures=measured.measures,
        interval=wilson_interval(right, len(scores)) if task.is_right_or_wrong else None,
        missing=scores.count(None),
        examples=measured.examples,
        seconds=time.perf_counter() - started,
    )


def _failure(candidate: _Candidate, message: str, answered: list[Example]) -> ModelResult:
    return ModelResult(
        name=candidate.name, sha256=candidate.sha256, missing=len(answered), examples=answered, failure=message
    )
