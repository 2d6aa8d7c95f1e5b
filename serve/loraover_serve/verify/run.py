"""Verification, from its arguments to the report."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from loraover.adapters.convert.kind import why_convert
from loraover.adapters.convert.run import convert_adapter
from loraover.adapters.logits.prompts import MAX_TOKENS, read_prompts
from loraover.callbacks.seal_checkpoints import checkpoints
from loraover.checkpoint.base_model import resolve_base
from loraover.checkpoint.base_modules import target_module
from loraover.checkpoint.carried_files import tokenizer_of
from loraover.checkpoint.files import CONFIG_FILE
from loraover.checkpoint.peft_adapter import AdapterDir, read_adapter_dir, read_source
from loraover.common.atomic_output import check_writable, publish_directory, publish_file, publish_text
from loraover.common.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    LoraOverError,
    OutputError,
    UnscoredError,
    UnwrittenReportError,
)
from loraover.common.provenance import today
from loraover.models.device import choose_device
from loraover.models.load import ModelSource, load_config, load_skeleton, load_tokenizer
from loraover.training.run.folder import TRAINER_FOLDER
from loraover_serve.comparison.adapters import check_plain, check_task
from loraover_serve.engines import engine_class
from loraover_serve.engines.answers import ADAPTER, BASE
from loraover_serve.engines.base import Engine, RunningServer, Setting
from loraover_serve.engines.endpoint import as_chats, takes_chats_only
from loraover_serve.engines.installed import check_installed, machine, versions
from loraover_serve.judge.limits import EXIT_CODES, Verdict
from loraover_serve.verify.evidence import Answers
from loraover_serve.verify.faults import RightAdapter
from loraover_serve.verify.html import HTML_FILE, to_page
from loraover_serve.verify.judge import EngineJudge
from loraover_serve.verify.reference import TorchReference, fit_reference, make_reference
from loraover_serve.verify.report import REPORT_FILE, EngineResult, VerifyReport
from loraover_serve.verify.request import VerifyRequest
from loraover_serve.verify.variants import Variants, read_lora
from loraover_serve.vllm.server import signals_as_interrupts

MOST_EARLIER = 8
"""Checkpoints of a run, and adapters beside one, that are looked at, since PyTorch runs each."""

KEPT_PREFIX = "loraover-verify-kept-"
"""Beginning of the names of temporary folders that outlive a verification."""


def verify_with_pytorch(request: VerifyRequest) -> VerifyReport:
    """Verify engines by what PyTorch answers; see `verify_adapter`."""
    assert request.adapter is not None
    if request.output is not None:
        check_writable(request.output, outside=request.adapter)
    check_installed(request)
    with signals_as_interrupts(), tempfile.TemporaryDirectory(prefix="loraover-verify-") as scratch:
        return _verify(request, Path(scratch))


def _verify(request: VerifyRequest, scratch: Path) -> VerifyReport:
    """Ask PyTorch, then each engine, and write the report; if every engine failed, raise the first one's error."""
    assert request.adapter is not None
    adapter = _read(request, scratch)
    check_plain(adapter, "the check of engines")
    base = resolve_base([adapter], request.model, option=request.named("model"), say=request.report.line)
    check_task(adapter, base, "verify")
    longest = _longest(base, request)
    device = str(choose_device(request.device))
    confusable = [read_adapter_dir(path) for path in request.confusable]
    subject = make_subject(adapter, base, confusable or neighbours(request.adapter, base))
    found = read_prompts(base, request.prompts, longest=longest)
    if found.cut:
        request.report.line(f"prompts that were cut to their first {longest} tokens: {found.cut}")
    prompts = [tuple(batch[0].tolist()) for batch in found.batches]
    longest = max(map(len, prompts)) + request.new_tokens
    setting = make_setting(request, base, scratch, longest)
    setting = replace(setting, adapters={ADAPTER: adapter.path.resolve()})
    for name in request.asked:
        engine_class(name).check(setting)
    prompt_source = found.source
    if setting.server is not None and takes_chats_only(setting):
        request.report.line("the server answers chats only: each prompt is the message of a chat")
        prompts, messages = as_chats(tokenizer_of(adapter.path, load_tokenizer(base)), prompts)
        setting = replace(setting, server=replace(setting.server, messages=messages))
        prompt_source += ", each the message of a chat" if messages else ""
    dtype = request.compute_dtype
    asked = prompts, request.new_tokens, device, request.report, dtype
    base = fit_reference(adapter, base, *asked, request.max_memory_gib)
    setting = replace(setting, base=base)
    reference = make_reference(adapter, base, *asked)
    variants = Variants(adapter, base, device, reference.questions, dtype)
    judge = EngineJudge(reference, variants, subject, request.declared_format, request.without_mixed)
    results, failures = _verify_all(request, setting, judge)
    made = _report(request, base, reference, prompt_source, results)
    logs = sorted(scratch.glob("*/*.log"))
    if request.output is not None and (logs or len(failures) < len(results)):
        _write(made, request.output, request.adapter, logs)
    if len(failures) == len(results):
        raise failures[0]
    return made


def _read(request: VerifyRequest, scratch: Path) -> AdapterDir:
    """Read the adapter; one of another kind is converted exactly, and PEFT still runs what was trained."""
    assert request.adapter is not None
    reason = why_convert(request.adapter, {})
    if reason is None:
        return read_source(request.adapter)
    request.report.line(f"{reason}: converting it into an exact plain LoRA for the engines")
    converted = scratch / "converted" / request.adapter.resolve().name
    convert_adapter(request.adapter, converted, model=request.model)
    return replace(read_source(converted), trained_as=request.adapter.resolve())


def make_setting(request: VerifyRequest, base: ModelSource, scratch: Path, longest: int) -> Setting:
    """Return the settings with which engines are started, without the folders of each."""
    assert request.adapter is not None
    server = None
    if request.endpoint is not None:
        (name,), key = request.served_name, request.key_variable
        server = RunningServer(request.endpoint, name, request.base_name, key)
    adapters, log, device = {ADAPTER: request.adapter.resolve()}, scratch / "log", str(choose_device(request.device))
    return Setting(
        request, adapters, base, scratch, log, longest, device=device, base_gguf=request.base_gguf, server=server
    )


def _report(
    request: VerifyRequest,
    base: ModelSource,
    reference: TorchReference,
    prompt_source: str,
    results: list[EngineResult],
) -> VerifyReport:
    return VerifyReport(
        verdict=next(verdict for verdict in EXIT_CODES if verdict in {result.verdict for result in results}),
        engines=results,
        adapter=request.shown("adapter"),
        base_model=base.name,
        reference=reference.name,
        sensitivity=reference.sensitivity,
        bias=reference.bias,
        served_format=request.declared_format,
        prompts=len(reference.questions),
        prompt_source=prompt_source,
        new_tokens=request.new_tokens,
        device=str(choose_device(request.device)),
        command=request.command(),
        versions=versions(request.asked),
        hardware=machine(),
        date=today(),
    )


def make_subject(adapter: AdapterDir, base: ModelSource, confusable: Sequence[AdapterDir] = ()) -> RightAdapter:
    """The adapter whose faults are looked for, with what its base model's configuration says of its heads.

    Args:
        adapter: The adapter.
        base: Its base model.
        confusable: Other adapters that an engine may have served instead.

    Raises:
        ExportError: A LoRA with a bias.
        CheckpointError: An adapter of another base model.
    """
    text, skeleton = load_config(base).get_text_config(), load_skeleton(base)
    deltas = read_lora(adapter)
    for each in (adapter, *confusable):
        check_plain(each, "the check of engines")
        for module in each.modules:  # PEFT leaves out what fits nowhere, with a warning only
            target_module(skeleton, each, module)
    queries = getattr(text, "num_attention_heads", None)  # GPT-2 and others have no heads for keys of their own
    keys = getattr(text, "num_key_value_heads", None) or queries
    heads = {} if queries is None else {"q_proj": queries, "k_proj": keys}
    return RightAdapter(
        adapter.config, deltas, heads, bool(adapter.others), _earlier(Path(adapter.path)), tuple(confusable)
    )


def neighbours(adapter: Path, base: ModelSource) -> list[AdapterDir]:
    """The newest other adapters of a base model in the folders beside an adapter, one of which may be served instead.

    Args:
        adapter: Folder of the adapter.
        base: Its base model.
    """
    mine, skeleton, found = adapter.resolve(), load_skeleton(base), list[AdapterDir]()
    beside = [path.parent for path in mine.parent.glob(f"*/{CONFIG_FILE}") if path.parent != mine]
    for folder in sorted(beside, key=lambda path: path.stat().st_mtime, reverse=True)[:MOST_EARLIER]:
        with suppress(LoraOverError):  # it is no LoRA, or one of another base model
            read = read_adapter_dir(folder)
            check_plain(read, "the check of engines")
            for module in read.modules:
                target_module(skeleton, read, module)
            found.append(read)
    return found


def _earlier(adapter: Path) -> tuple[AdapterDir, ...]:
    """The newest adapters of other steps of the same run, where its Trainer left them."""
    places = (adapter, adapter.parent, adapter.parent / TRAINER_FOLDER)
    found = [each for place in places for each in checkpoints(place) if each.resolve() != adapter.resolve()]
    read: list[AdapterDir] = []
    for each in found[:MOST_EARLIER]:
        with suppress(CheckpointError):  # its saving was interrupted, or it is no LoRA
            read.append(read_adapter_dir(each))
    return tuple(read)


def _verify_all(
    request: VerifyRequest, setting: Setting, judge: EngineJudge
) -> tuple[list[EngineResult], list[LoraOverError]]:
    """Verify one engine after the other; a failure is a result beside those of the others."""
    results: list[EngineResult] = []
    failures: list[LoraOverError] = []
    for name in request.asked:
        folder = setting.scratch / name
        folder.mkdir()
        start = time.perf_counter()
        try:
            results.append(verify_engine(name, replace(setting, scratch=folder, log=folder / f"{name}.log"), judge))
        except LoraOverError as error:
            error.args = (_with_logs(str(error), folder, request.output),)
            seconds, is_silent = time.perf_counter() - start, isinstance(error, UnscoredError)
            failures += [] if is_silent else [error]
            verdict: Verdict = "inconclusive" if is_silent else "failed"
            results.append(EngineResult(engine=name, verdict=verdict, reason=str(error), seconds=seconds))
    return results, failures


def _with_logs(message: str, folder: Path, output: Path | None) -> str:
    """The message of an engine that failed, with the places where its logs are kept.

    Args:
        message: The message, which may name files in the engine's folder.
        folder: The engine's folder, which does not outlive this run.
        output: Folder that will have the logs; None keeps them in a new temporary folder.
    """
    logs = sorted(folder.glob("*.log"))
    if not logs:
        return message.replace(f"{folder}/", "")
    if output is None:
        output = Path(tempfile.mkdtemp(prefix=KEPT_PREFIX))
        _copy(logs, output)
    text = message.replace(str(folder), str(output))
    unnamed = [place for place in (str(output / log.name) for log in logs) if place not in text]
    return f"{text} (log: {', '.join(unnamed)})" if unnamed else text


def verify_engine(name: str, setting: Setting, judge: EngineJudge) -> EngineResult:
    """Start one engine, ask it, stop it, and judge its answers.

    Args:
        name: Name of the engine.
        setting: What it is started with.
        judge: What it is judged by.

    Raises:
        LoraOverError: An engine that does not start or fails.
    """
    start = time.perf_counter()
    with engine_class(name).start(setting) as engine:
        setting.request.report.line(f"asking {name}, the base model first")
        answers, version = ask(engine, judge.reference, without_mixed=judge.without_mixed), engine.version()
    seconds = time.perf_counter() - start
    setting.request.report.line(f"comparing the answers of {name} with PyTorch's")
    return judge.judge(name, version, answers, seconds)


def ask(engine: Engine, reference: TorchReference, *, without_mixed: bool = False) -> Answers:
    """Ask a running engine everything that the judge needs.

    Args:
        engine: The engine.
        reference: PyTorch's answers, whose questions are asked.
        without_mixed: Whether no requests for both models are sent together.

    Raises:
        EngineError: A request that failed, other than one of those that are sent together.
    """
    questions, is_one_model = reference.questions, engine.is_one_model
    base, adapter = (engine.logprobs(arm, questions) for arm in (BASE, ADAPTER))
    greedy = engine.generated(questions, max(len(question.continuation) for question in questions))
    mixed, mixed_failure = None, None
    if not is_one_model and not without_mixed:
        try:
            mixed = engine.mixed(questions)  # last, since its faults may stay in a cache
        except EngineError as error:  # what was answered before is judged all the same
            mixed_failure = str(error)
    return Answers(
        base,
        adapter,
        greedy,
        mixed,
        mixed_failure,
        without_mixed and not is_one_model,
        is_one_model,
        engine.responses,
        engine.chats,
    )


def _longest(base: ModelSource, request: VerifyRequest) -> int:
    """Largest number of tokens of a prompt: what the base model takes together with an answer, and MAX_TOKENS at most.

    Raises:
        ConfigError: A base model that does not take such answers.
    """
    new_tokens = request.new_tokens
    limit = getattr(load_config(base).get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return MAX_TOKENS
    if limit <= new_tokens:
        raise ConfigError(
            f"{request.named('new_tokens')} is {new_tokens}, and {base.name} takes {limit} tokens; choose fewer."
        )
    return min(MAX_TOKENS, int(limit) - new_tokens)


def _write(report: VerifyReport, output: Path, adapter: Path, logs: Sequence[Path]) -> None:
    """Publish report, page and engines' logs; if that fails, keep report and logs in a temporary folder."""
    text = report.model_dump_json(indent=1) + "\n"
    try:
        with publish_directory(output, outside=adapter) as draft:
            (draft / REPORT_FILE).write_text(text, encoding="utf-8")
            to_page(report).write(draft / HTML_FILE)
            for log in logs:
                shutil.copyfile(log, draft / log.name)
    except OutputError as error:
        kept = _kept(text, logs)
        message = str(error) if kept is None else f"{error} The report is kept in {kept}."
        raise UnwrittenReportError(message, report.model_copy(update={"kept": kept})) from error


def _kept(text: str, logs: Sequence[Path]) -> Path | None:
    """A new temporary folder with the report and the logs; None if they cannot be written there either."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=KEPT_PREFIX))
        publish_text(folder / REPORT_FILE, text)
        _copy(logs, folder)
    except OSError:
        return None
    return folder


def _copy(logs: Sequence[Path], folder: Path) -> None:
    for log in logs:
        publish_file(folder / log.name, partial(shutil.copyfile, log))
