"""Evaluate a base model and its adapters, one after another."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loraover.checkpoint.base_model import model_digest
from loraover.checkpoint.carried_files import adapter_digest, tokenizer_of
from loraover.client.endpoint import Endpoint
from loraover.common.atomic_output import check_file_writable, publish_text
from loraover.common.errors import ConfigError, EngineError, LoraOverError
from loraover.common.provenance import environment, hardware
from loraover.common.quiet import quiet_libraries_within
from loraover.common.strict_json import read_json
from loraover.models.load import ModelSource, load_tokenizer, resolve_model
from loraover.sources.verb import verb
from loraover_lab.evaluation import TASKS
from loraover_lab.evaluation.base import IN_CHAT_TEMPLATE, Example, Questions
from loraover_lab.evaluation.request import EvaluationRequest
from loraover_lab.evaluation.results import Evaluation, ModelResult, wilson_interval
from loraover_lab.evaluation.subjects import Answerer, EndpointAnswerer, in_memory

BASE_MODEL = "base"


@dataclass(frozen=True)
class _Candidate:
    """A model that has not been asked yet."""

    name: str
    sha256: str | None  # of its adapter; None for a model that cannot be recognised by its files
    load: Callable[[], Answerer]

    @property
    def key(self) -> tuple[str, str | None]:
        return self.name, self.sha256


@verb(EvaluationRequest)
def evaluate(request: EvaluationRequest) -> Evaluation:
    """Put a benchmark's questions to a base model, then to each adapter.

    Adapters whose files are the same as in the output, and models of the same name at the same endpoint, are not asked
    again, and answers without ratings are only rated.

    Returns:
        The contents of the output file. A failure of a model after the first one is that model's result.

    Raises:
        LoraOverError: The request cannot be used, or the first model fails.
    """
    with quiet_libraries_within(bars=request.report.shows_bars):
        return _evaluate(request)


def _evaluate(request: EvaluationRequest) -> Evaluation:
    report, output = request.report, request.output
    task = TASKS[request.task]
    server = None if request.endpoint is None else Endpoint(request.endpoint, request.key_variable)
    task.check(request)
    if output is not None:
        check_file_writable(output)
    source = resolve_model(request.model)
    report.line(f"base model: {source.origin}")
    questions = task.read(request)
    report.line(f"questions: {questions.origin}, {len(questions.rows)} of them")
    tokenizer = load_tokenizer(source)
    readers = {adapter: tokenizer_of(adapter, tokenizer) for adapter in request.adapters}
    candidates = _candidates(request, source, tokenizer, readers, server)
    engine = f"PyTorch, {request.dtype}" if server is None else f"endpoint {server.api}"
    new_tokens = request.new_tokens or task.max_new_tokens
    settings = {"engine": engine, "answers": "greedy", "new tokens": str(new_tokens)}
    settings |= {"batch size": str(request.batch_size)} | task.settings(request, tokenizer)
    settings |= _own_templates(request, tokenizer, readers)
    found = Evaluation(
        task=request.task,
        model=request.model,
        model_origin=source.origin,
        data_origin=questions.origin,
        data_sha256=hashlib.sha256(json.dumps(questions.rows, sort_keys=True).encode()).hexdigest(),
        questions=len(questions.rows),
        is_right_or_wrong=task.is_right_or_wrong,
        settings=settings,
        versions=environment(*task.packages),
        hardware=hardware(),
        command=request.command(),
    )
    if output is not None:  # what is in the file may be another model's, which the same folder held
        found = found.model_copy(update={"model_digest": model_digest(source, weights=server is None)})
    names, keys = {c.name for c in candidates}, {c.key for c in candidates}
    known = {key: result for key, result in _known(found, output).items() if key in keys or key[0] not in names}
    for candidate in candidates:
        before = result = known.pop(candidate.key, None)
        if result is not None and result.failure is None and (task.is_right_or_wrong or not result.missing):
            report.line(f"{candidate.name}: finished already")
        else:
            answered = [] if result is None else result.examples
            publish = partial(_publish, output, found, list(known.values()))
            try:
                result = _result(candidate, answered, questions, request, publish)
            except LoraOverError as error:
                if not found.results:
                    raise
                result = _failure(candidate, str(error), answered)
            if result.failure is not None and before is not None and before.measures:  # rated in part, and not again
                report.line(f"{candidate.name}: {result.failure}")
                result = before
            publish(result)
        found = found.model_copy(update={"results": [*found.results, result]})
        if request.on_result is not None:
            request.on_result(found)
        if result.failure is not None and len(found.results) == 1:
            kept = "" if output is None else f" Its answers are kept in {output}; the same command rates them."
            raise EngineError(result.failure + kept)
    return found


def _own_templates(request: EvaluationRequest, tokenizer: Any, readers: Mapping[Path, Any]) -> dict[str, str]:
    """Say which adapters are asked in another chat template than the base model, and return that as a setting."""
    task, found = TASKS[request.task], set()
    for adapter, own in readers.items():
        if own is not tokenizer and task.settings(request, own).get("prompt") == IN_CHAT_TEMPLATE:
            request.report.line(f"{adapter}: its questions are put into its own chat template, not the base model's")
            found.add(hashlib.sha256(own.chat_template.encode()).hexdigest()[:12])
    return {"chat template of adapters": f"SHA-256 {', '.join(sorted(found))}"} if found else {}


def _candidates(
    request: EvaluationRequest,
    source: ModelSource,
    tokenizer: Any,
    readers: Mapping[Path, Any],
    server: Endpoint | None,
) -> list[_Candidate]:
    """List the models to evaluate, after all checks that need no answers."""
    size = request.batch_size
    if server is not None:

        def ask(name: str) -> Callable[[], Answerer]:
            return lambda: EndpointAnswerer(server, name, tokenizer, size)

        return [_Candidate(name, None, ask(name)) for name in request.endpoint_models]

    def load(adapter: Path | None, own: Any) -> Callable[[], Answerer]:
        return lambda: in_memory(source, own, adapter, dtype=request.dtype, batch_size=size)

    adapters = [_Candidate(str(each), adapter_digest(each), load(each, readers[each])) for each in request.adapters]
    return [_Candidate(BASE_MODEL, None, load(None, tokenizer)), *adapters]


def _known(wanted: Evaluation, output: Path | None) -> dict[tuple[str, str | None], ModelResult]:
    """Read results of the same evaluation, by name and digest, that are finished or have answers at least."""
    if output is None or not output.exists():
        return {}
    begun = read_json(output, Evaluation)
    before, now = _identity(begun), _identity(wanted)
    if not any(example.score is not None for result in begun.results for example in result.examples):
        for settings in (before["settings"], now["settings"]):
            settings.pop("judge", None)  # nothing depends on it yet: another grader may rate the answers
    changed = [key for key in now if before[key] != now[key]]
    if changed:
        raise ConfigError(f"{output}: holds another evaluation ({', '.join(changed)} differ); name a new file.")
    return {(result.name, result.sha256): result for result in begun.results if result.examples}


def _identity(evaluation: Evaluation) -> dict[str, Any]:
    return evaluation.model_dump(exclude={"results", "command", "hardware"})


def _publish(output: Path | None, before: Evaluation, after: list[ModelResult], result: ModelResult) -> None:
    """Write a file with the finished results, the new one, and kept results of models whose turn comes later."""
    if output is not None:
        content = before.model_copy(update={"results": [*before.results, result, *after]})
        publish_text(output, content.model_dump_json(indent=1) + "\n")


def _result(
    candidate: _Candidate,
    answered: list[Example],
    questions: Questions,
    request: EvaluationRequest,
    publish: Callable[[ModelResult], None],
) -> ModelResult:
    """Put the questions to one model, or only rate its answers."""
    task, started = TASKS[request.task], time.perf_counter()

    def keep(answers: list[Example]) -> None:
        answered[:] = answers
        publish(_failure(candidate, "its answers have not been rated", answers))

    request.report.line(f"{candidate.name}: answered already" if answered else f"{candidate.name}:")
    try:
        if answered:
            measured = task.rate(answered, questions, request)
        else:
            measured = task.measure(candidate.load(), questions, request, keep)
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
