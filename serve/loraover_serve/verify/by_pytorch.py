"""Verification of engines by PyTorch's answers, from the arguments to the results."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraover.adapters.convert.kind import why_convert
from loraover.adapters.convert.run import convert_adapter
from loraover.adapters.prompts import MAX_TOKENS, read_prompts
from loraover.callbacks.seal_checkpoints import checkpoints
from loraover.checkpoint.base_model import resolve_base
from loraover.checkpoint.base_modules import target_module
from loraover.checkpoint.carried_files import tokenizer_of
from loraover.checkpoint.files import CONFIG_FILE, TRAINER_FOLDER
from loraover.checkpoint.peft_adapter import AdapterDir, read_adapter_dir
from loraover.checkpoint.source import read_source
from loraover.common.errors import CheckpointError, ConfigError, EngineError, LoraOverError, UnscoredError
from loraover.common.request import as_written
from loraover.models.device import choose_device
from loraover.models.load import ModelSource, load_config, load_skeleton, load_tokenizer
from loraover_serve.comparison.adapters import check_plain, check_task
from loraover_serve.comparison.served_weights import open_if_given
from loraover_serve.engines import ENDPOINT, engine_class
from loraover_serve.engines.answers import of_another_vocabulary
from loraover_serve.engines.base import RunningServer, Setting
from loraover_serve.engines.endpoint import as_chats, takes_chats_only
from loraover_serve.engines.installed import check_installed, machine, versions
from loraover_serve.judge.command import unanswered
from loraover_serve.judge.evidence import Evidence
from loraover_serve.judge.limits import ADAPTER
from loraover_serve.judge.models import Answers
from loraover_serve.judge.rules import judge
from loraover_serve.judge.templates import Conversations
from loraover_serve.verify.by_vectors import by_vectors
from loraover_serve.verify.chats import conversations
from loraover_serve.verify.faults import RightAdapter
from loraover_serve.verify.pytorch import TorchModels, fit_reference, make_models
from loraover_serve.verify.report import KEPT_PREFIX, EngineResult, copy_logs, faults_known_of
from loraover_serve.verify.request import Found, VerifyRequest
from loraover_serve.verify.variants import read_lora
from loraover_serve.verify.vector_models import has_vectors
from loraover_serve.vllm.server import signals_as_interrupts

MOST_EARLIER = 8
"""Largest number of earlier checkpoints, and of adapters in other folders, that PyTorch runs for comparison."""


@contextmanager
def by_pytorch(request: VerifyRequest) -> Iterator[Found]:
    """Ask PyTorch, then each engine; the engines' logs exist during the block."""
    assert request.adapter is not None
    with signals_as_interrupts(), tempfile.TemporaryDirectory(prefix="loraover-verify-") as folder:
        scratch = Path(folder)
        if (reason := why_convert(request.adapter, {})) is None:
            adapter = read_source(request.adapter)
        else:  # PEFT still runs what was trained
            request.report.line(f"{reason}: converting it into an exact plain LoRA for the engines")
            converted = scratch / "converted" / request.adapter.resolve().name
            convert_adapter(request.adapter, converted, model=request.model)
            adapter = replace(read_source(converted), trained_as=request.adapter.resolve())
        check_plain(adapter, "the check of engines")
        base = resolve_base([adapter], request.model, option=request.named("model"), say=request.report.line)
        if has_vectors(adapter, base):
            setting = make_setting(request, base, scratch, 0)
            setting = replace(setting, adapters={ADAPTER: adapter.path.resolve()})
            yield by_vectors(request, adapter, base, setting)
            return
        check_installed(request)
        check_task(adapter, base, "verify")
        longest, device = _longest(base, request), str(choose_device(request.device))
        confusable = [read_adapter_dir(path) for path in request.confusable]
        subject = make_subject(adapter, base, confusable or neighbours(request.adapter, base))
        found = read_prompts(base, request.prompts, longest=longest)
        if found.cut:
            request.report.line(f"prompts that were cut to their first {longest} tokens: {found.cut}")
        prompts, messages = [tuple(batch[0].tolist()) for batch in found.batches], tuple[str, ...]()
        setting = make_setting(request, base, scratch, max(map(len, prompts)) + request.new_tokens)
        setting = replace(setting, adapters={ADAPTER: adapter.path.resolve()})
        for name in request.asked:
            engine_class(name).check(setting)
        if setting.server is not None and takes_chats_only(setting):
            request.report.line("the server answers chats only: each prompt is the message of a chat")
            prompts, messages = as_chats(tokenizer_of(adapter.path, load_tokenizer(base)), prompts)
        asked = prompts, request.new_tokens, device, request.report, request.compute_dtype
        base = fit_reference(adapter, base, *asked, request.max_memory_gib)
        with open_if_given(request.base_weights) as weights:
            models = make_models(adapter, base, *asked, subject=subject, messages=messages, weights=weights)
        if setting.server is not None and not request.without_template:
            own = tokenizer_of(adapter.path, load_tokenizer(base))
            models = replace(models, conversations=conversations(own, models.vocabulary))
        results, failures = _verify_all(request, replace(setting, base=base), models)
        facts = {
            "adapter": request.shown("adapter"),
            "base_model": base.name,
            "reference": models.name,
            "sensitivity": models.sensitivity,
            "bias": models.bf16_strength,
            "prompts": len(models.questions),
            "prompt_source": found.source + (", each the message of a chat" if messages else ""),
            "new_tokens": request.new_tokens,
            "device": device,
            "versions": versions(request.asked),
            "hardware": machine(),
        }
        yield Found(facts, results, failures, sorted(scratch.glob("*/*.log")))


def make_setting(request: VerifyRequest, base: ModelSource, scratch: Path, longest: int) -> Setting:
    """Return the settings with which engines are started, without the folders of each."""
    assert request.adapter is not None
    server = None
    if request.endpoint is not None:
        (name,), key = request.served_name, request.key_variable
        server = RunningServer(request.endpoint, name, request.base_name, key)
    adapters, log, device = {ADAPTER: request.adapter.resolve()}, scratch / "log", str(choose_device(request.device))
    return Setting(
        request, adapters, base, scratch, log, longest, device=device, base_gguf=request.gguf_of_base, server=server
    )


def make_subject(adapter: AdapterDir, base: ModelSource, confusable: Sequence[AdapterDir] = ()) -> RightAdapter:
    """The adapter whose faults are looked for, with the numbers of heads from its base model's configuration."""
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
    """The newest other adapters of a base model beside an adapter, one of which may be served instead."""
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
    request: VerifyRequest, setting: Setting, models: TorchModels
) -> tuple[list[EngineResult], list[LoraOverError]]:
    """Verify one engine after the other; a failure is a result beside those of the others."""
    results: list[EngineResult] = []
    failures: list[LoraOverError] = []
    for name in request.asked:
        folder = setting.scratch / name
        folder.mkdir()
        start = time.perf_counter()
        try:
            asked = models if name == ENDPOINT else replace(models, conversations=Conversations())
            results.append(verify_engine(name, replace(setting, scratch=folder, log=folder / f"{name}.log"), asked))
        except LoraOverError as error:
            error.args = (_with_logs(str(error), folder, request.output),)
            seconds = time.perf_counter() - start
            failures += [] if isinstance(error, UnscoredError) else [error]
            results.append(EngineResult(engine=name, seconds=seconds, **unanswered(error)))
    return results, failures


def _with_logs(message: str, folder: Path, output: Path | None) -> str:
    """The message of an engine that failed, with the places where its logs are kept."""
    logs = sorted(folder.glob("*.log"))
    if not logs:
        return message.replace(f"{folder}/", "")
    if output is None:
        output = Path(tempfile.mkdtemp(prefix=KEPT_PREFIX))
        copy_logs(logs, output)
    text = message.replace(str(folder), str(output))
    unnamed = [place for place in (str(output / log.name) for log in logs) if place not in text]
    return f"{text} (log: {', '.join(unnamed)})" if unnamed else text


def verify_engine(name: str, setting: Setting, models: TorchModels) -> EngineResult:
    """Start one engine, ask it, stop it, and judge its answers.

    Args:
        name: Name of the engine.
        setting: Settings that the engine is started with.
        models: The questions, and what PyTorch answers.

    Raises:
        LoraOverError: An engine that does not start or fails.
    """
    start, request = time.perf_counter(), setting.request
    assert isinstance(request, VerifyRequest)
    with engine_class(name).start(setting) as engine:
        request.report.line(f"asking {name}, the base model first")
        answers, known = (
            engine.answers(models, without_mixed=request.without_mixed),
            faults_known_of(engine.program(name)),
        )
    if name == ENDPOINT and request.without_template:
        answers = replace(answers, without_template=answers.chats is None)
    seconds = time.perf_counter() - start
    request.report.line(f"comparing the answers of {name} with PyTorch's")
    found = judge_answers(name, answers, models, request.declared_format)
    return EngineResult(seconds=seconds, **known, **found)


def judge_answers(engine: str, answers: Answers, models: TorchModels, served_format: str = "bf16") -> dict[str, Any]:
    """Compare an engine's answers with PyTorch's, and look for a fault if they differ."""
    vocabulary = models.vocabulary
    for row in (row for rows in (answers.base, answers.adapter, *answers.mixed.values()) for row in rows.values()):
        if min(row) < 0:
            raise EngineError(f"{engine}: answers with a token of a negative id, {min(row)}.")
        if max(row) >= vocabulary:
            raise EngineError(of_another_vocabulary(engine, max(row) + 1, vocabulary))
    unknown = [token for answer in answers.greedy for token in answer.tokens if not 0 <= token < vocabulary]
    if unknown:
        raise EngineError(
            f"{engine}: generates the token {unknown[0]}, and the base model has {vocabulary}; it serves another "
            f"model. Name the base model with {as_written('model')}."
        )
    return {"engine": engine} | judge(Evidence(models, answers), served_format, VerifyRequest.named)


def _longest(base: ModelSource, request: VerifyRequest) -> int:
    """Largest number of tokens of a prompt, MAX_TOKENS or what the base model takes together with an answer."""
    new_tokens = request.new_tokens
    limit = getattr(load_config(base).get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return MAX_TOKENS
    if limit <= new_tokens:
        raise ConfigError(
            f"{request.named('new_tokens')} is {new_tokens}, and {base.name} takes {limit} tokens; choose fewer."
        )
    return min(MAX_TOKENS, int(limit) - new_tokens)
