"""Recording, from its arguments to the reference, and to the checker as one file of the standard library."""

from __future__ import annotations

import gc
import gzip
import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from pydantic import Field

from loraover.adapters.prompts import Prompts, read_prompts
from loraover.checkpoint.base_model import model_digest, resolve_base
from loraover.checkpoint.carried_files import adapter_digest, tokenizer_of
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.checkpoint.source import read_source
from loraover.common.atomic_output import check_file_writable, publish_file
from loraover.common.errors import ConfigError
from loraover.common.provenance import environment, today
from loraover.common.strict_json import StrictModel
from loraover.models.device import choose_device
from loraover.models.fast_linear import fast_linear
from loraover.models.load import ModelSource, load_config, load_tokenizer
from loraover.reference import reference_model
from loraover.sources.verb import verb
from loraover_serve.comparison.adapters import check_plain, check_task
from loraover_serve.comparison.rounding import FORMATS, as_served
from loraover_serve.comparison.served_weights import ServedWeights, check_different, open_if_given
from loraover_serve.engines.endpoint import as_chats
from loraover_serve.engines.torch import model_logits
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.names import OF_EARLIER_WEIGHTS
from loraover_serve.judge.reference import OF_ALL_BASES
from loraover_serve.verify.by_pytorch import make_subject
from loraover_serve.verify.by_reference import SEALED
from loraover_serve.verify.chats import pack_chats
from loraover_serve.verify.checker import write_checker
from loraover_serve.verify.faults import RightAdapter
from loraover_serve.verify.long import check_earlier, is_long_left_out, long_passes, record_caches, wanted_long
from loraover_serve.verify.pack import (
    NAMED,
    RecordedPlace,
    choose_places,
    faulty_tops,
    main_faults,
    many_faults,
    pack_places,
    pack_question,
    planned_passes,
    texts_of,
)
from loraover_serve.verify.power import MEASURED, choose_number, effect_of, measure_rounding
from loraover_serve.verify.pytorch import TorchModels, fit_reference, load_base, make_models
from loraover_serve.verify.request import RecordRequest
from loraover_serve.verify.right_models import EXACT, right_passes, tree_share
from loraover_serve.verify.vector_models import has_vectors
from loraover_serve.verify.vector_recorder import check_no_vectors, record_vectors
from loraover_serve.verify.work import ROUNDED, TRIED, Advance, Work, each_done, time_passes

PLAIN_VERSION, SCHEMA_VERSION = 1, 2  # of references without and with served weights, which older checkers overlook
QUESTIONS_FILE = Path(__file__).with_name("questions.txt")
LONGEST = 64  # tokens of a question


class RecordReport(StrictModel):
    """Summary of a recording."""

    path: Path = Field(description="The file")
    size_bytes: int = Field(description="Its size, in bytes")
    questions: int = Field(description="Number of questions")
    positions: int = Field(description="Number of tokens of answers at which logprobs are recorded")
    variants: int = Field(description="Number of models with a fault that are recorded")
    stale: list[str] = Field(default=[], description="Stale caches that are recorded on long questions")
    chats: int = Field(default=0, description="Number of chats that are recorded in the adapter's template")
    has_date: bool = Field(default=False, description="Whether the template prints a date, which may be another one")
    seconds: float = Field(default=0.0, description="Time that the recording took, in seconds")
    vectors: str | None = Field(
        default=None, description="Vectors, classes or scores that are recorded, in words; None for logprobs"
    )
    bases: list[str] = Field(default=[], description="Served weights of the base model that are recorded, if any are")
    effect: float = Field(
        description="RMS change of logprobs by the adapter, in nats; of vectors, relative to their RMS size"
    )
    half: float | None = Field(
        description="Half the width of the interval in which a server that rounds like PyTorch in bfloat16 shows the "
        "strength of the adapter; None if the questions are too few to know it"
    )
    decides: bool = Field(
        description="Whether, with twice that noise, a right adapter is still called as trained, and an adapter with "
        "20 % too much or too little strength is not"
    )

    @classmethod
    def of(cls, content: Mapping[str, Any], path: Path, size_bytes: int, seconds: float) -> RecordReport:
        """Summarise the contents of a reference."""
        chats = content.get("chats", {"conversations": ()})["conversations"]
        caches = content.get("caches", {"variants": ()})["variants"]
        every = [content, *content.get("bases", ())]
        halves = [each["power"]["half"] for each in every]
        return cls(
            path=path,
            size_bytes=size_bytes,
            questions=len(content["questions"]),
            positions=len(content.get("positions", content["questions"])),
            variants=len(content["variants"]) + len(content.get("settings", ())),
            vectors=content.get("words"),
            stale=[each["fault"] for each in caches if each["fault"] not in OF_EARLIER_WEIGHTS],
            chats=len(chats),
            has_date=any(each["date"] for each in chats),
            seconds=seconds,
            effect=content["effect"],
            bases=[f"{each['format']} ({each['sha256']:.12})" for one in every if (each := one.get("weights"))],
            half=None if None in halves else max(halves),
            decides=all(each["power"]["decides"] for each in every),
        )

    @property
    def exit_code(self) -> int:
        """0: a recording that fails raises an error."""
        return 0


@verb(RecordRequest)
def record_adapter(request: RecordRequest) -> RecordReport:
    """Record how an adapter answers, so that any server can be checked without PyTorch and the base model.

    Raises:
        ConfigError: Arguments that cannot be used, or a base model that cannot be loaded.
        CheckpointError: Files that cannot be read as an adapter or a checkpoint.
        DataError: A file of prompts that cannot be read.
        ExportError: An adapter that serving cannot apply as it is.
        OutputError: A file that cannot be written.
    """
    start = time.monotonic()
    for file in request.files.values():
        check_file_writable(file)
    adapter = read_source(request.adapter)
    check_plain(adapter, "a reference")
    base = resolve_base([adapter], request.model, option=request.named("model"), say=request.report.line)
    is_vectors = has_vectors(adapter, base)
    if not is_vectors:
        check_task(adapter, base, "record")
        check_no_vectors(request)
    elif request.base_weights:
        raise ConfigError(
            f"{request.named('base_weights')} is for models of texts, not of vectors or classes; leave it out."
        )
    earlier = None if request.earlier is None else read_source(request.earlier)
    if earlier is not None:
        check_plain(earlier, "a reference")
        check_earlier(request, adapter, earlier)
    with fast_linear():
        if is_vectors:
            content = record_vectors(
                request, adapter, base, digests(adapter, base, load_tokenizer(base), is_chat=False)
            )
            origin = "the built-in texts" if request.prompts is None else f"the prompts of {request.prompts.name}"
            content |= {"made": made(request, origin, str(choose_device(request.device)))}
        else:
            content = record_bases(request, adapter, base, earlier)
        sealed = None if request.sealed is None else sealed_reference(request, adapter, base)
    if request.sealed is not None and sealed is not None:
        content["digests"][SEALED] = hashlib.sha256(sealed).hexdigest()
        publish_file(request.sealed, lambda draft: draft.write_bytes(sealed), replace=request.force)
    raw = packed(content)
    publish_file(request.destination, lambda draft: draft.write_bytes(raw), replace=request.force)
    if request.checker is not None:
        publish_file(request.checker, write_checker, replace=request.force)
    return RecordReport.of(content, request.destination, len(raw), time.monotonic() - start)


def sealed_reference(request: RecordRequest, adapter: AdapterDir, base: ModelSource) -> bytes:
    """Contents of the sealed reference; its salt keeps others from finding the questions by their SHA-256."""
    request.report.line("recording the sealed reference")
    mine = replace(request, prompts=request.sealed_prompts, sealed=None, sealed_prompts=None, long=False, earlier=None)
    content = record_bases(mine, adapter, base)
    return packed(content | {"salt": secrets.token_hex(32)})


def packed(content: Mapping[str, Any]) -> bytes:
    """Bytes of the file of a reference."""
    return gzip.compress(json.dumps(content, separators=(",", ":"), allow_nan=False).encode(), mtime=0)


def record_bases(
    request: RecordRequest, adapter: AdapterDir, base: ModelSource, earlier: AdapterDir | None = None
) -> dict[str, Any]:
    """Contents of the reference on each of the served weights, or on the base model's own; see docs/formats.md."""
    check_different(request.base_weights)
    first, *others = request.base_weights or (None,)
    content = _record_on(first, request, adapter, base, earlier)
    beyond = []
    for where in others:
        other = _record_on(where, request, adapter, base, earlier)
        content["texts"] |= other["texts"]
        beyond.append(_beyond(content, other))
    return content | ({"bases": beyond} if beyond else {})


def _record_on(
    where: Path | None, request: RecordRequest, adapter: AdapterDir, base: ModelSource, earlier: AdapterDir | None
) -> dict[str, Any]:
    """Contents of the reference on weights that are open no longer than this takes, with the models that have them."""
    with open_if_given(where) as weights:
        found = record(request, adapter, base, earlier, weights)
    gc.collect()  # models refer to themselves
    return found


def _beyond(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Contents of another base of a reference that are not those of the first one."""
    every = {**dict.fromkeys(first), **other, "texts": first["texts"]}
    own = {key: value for key, value in every.items() if key not in first or first[key] != value}
    return {key: value for key, value in own.items() if key not in (*OF_ALL_BASES, "texts", "made", "digests")}


def record(
    request: RecordRequest,
    adapter: AdapterDir,
    base: ModelSource,
    earlier: AdapterDir | None = None,
    weights: ServedWeights | None = None,
) -> dict[str, Any]:
    """Contents of the reference on one base; see docs/formats.md."""
    device, say, dtype = str(choose_device(request.device)), request.report.line, request.compute_dtype
    tokenizer = tokenizer_of(adapter.path, load_tokenizer(base))
    long = wanted_long(request, base, tokenizer, QUESTIONS_FILE.read_text(encoding="utf-8").splitlines())
    found = read_questions(base, request.prompts, request.new_tokens)
    prompts, messages = as_chats(tokenizer, [tuple(batch[0].tolist()) for batch in found.batches])
    asked = prompts, request.new_tokens, device, request.report, dtype
    base = fit_reference(adapter, base, *asked, request.max_memory_gib)
    subject, model = make_subject(adapter, base), load_base(base, weights, dtype, device, request.report)
    work = plan_work(model, subject, prompts, request.new_tokens, long, 1 if earlier is None else 2, dtype)
    if long and is_long_left_out(request, is_streamed=base.is_streamed, seconds=work.long * work.pass_s):
        long, work = None, replace(work, long=0.0)
    say(f"recording {len(prompts)} questions takes about {work.seconds:.0f} s")
    shown = work.shown(request.report, "recording, passes of the model over a question")
    with reference_model(model, adapter) as adapted, shown as advance:
        how: dict[str, Any] = {"messages": messages, "answers_only": True, "weights": weights, "advance": advance}
        models = make_models(adapter, base, *asked, subject=subject, loaded=model, adapted=adapted, **how)
        say(f"running both models in {', '.join(FORMATS)}")
        each = (measure_rounding(models, as_served(name, dtype)) for name in FORMATS)
        formats = dict(zip(FORMATS, each_done(each, repeat(work.formats / len(FORMATS)), advance), strict=True))
        power = choose_number(
            len(models.questions), models.bf16_strength, formats["bf16"], chosen=bool(request.prompts)
        )
        models = replace(models, questions=models.questions[: power["questions"]])
        say(f"running {len(work.faults)} known faults of serving on {min(NAMED, power['questions'])} questions")
        places, variants = record_faults(models, work.faults, advance)
        caches: dict[str, Any] = {}
        if long is not None:
            caches = record_caches(request, adapted, models.variants, earlier, long, tokenizer)
            advance(work.long)
    return (
        {
            "schema_version": PLAIN_VERSION if weights is None else SCHEMA_VERSION,
            "adapter": request.adapter.resolve().name,
            "base_model": base.name,
            "digests": digests(adapter, base, tokenizer, is_chat=bool(messages)),
            "vocabulary": models.vocabulary,
            "sensitivity": models.sensitivity,
            "effect": effect_of(models),
            "formats": {
                name: {"distance": one.distance, "strength": one.strength.value} for name, one in formats.items()
            },
            "ends": sorted(models.ends),
            "power": power,
            "questions": [pack_question(tokenizer, question) for question in models.questions],
            "positions": pack_places(places, models.expected[BASE], models.expected[ADAPTER]),
            "texts": texts_of(tokenizer, [i for place in places for i in place.ids.tolist()]),
            "variants": variants,
            "made": made(request, found.source, device),
        }
        | caches
        | ({} if weights is None else {"weights": weights.facts})
        | pack_chats(tokenizer, models.vocabulary)
    )


def plan_work(
    model: Any,
    subject: RightAdapter,
    prompts: Sequence[tuple[int, ...]],
    new_tokens: int,
    long: Any,
    versions: int,
    dtype: str,
) -> Work:
    """The work of a recording, with the time of a pass, which is measured.

    Args:
        model: The base model.
        long: Long questions, as `long_prompts` returns them; None if they are left out.
        versions: Number of versions of the adapter that read long questions.
        dtype: Data type to run in.
    """
    number, longest, is_tree = len(prompts), max(map(len, prompts)) + new_tokens - 1, dtype in EXACT
    share, few = (partial(tree_share, new_tokens=new_tokens) if is_tree else len), prompts[:NAMED]
    named = share(few) / len(few)
    right = right_passes(prompts, new_tokens, dtype)
    return Work(
        pass_s=time_passes(lambda: [*model_logits(model, prompts[:TRIED], last=1)], min(TRIED, number)),
        right=right["answers"] + right["tree"] + 2 * right["exact"] + 2 * right["rounded"],
        formats=len(FORMATS) * (2 * named * min(MEASURED, number) + ROUNDED),
        faults=[each * named for each in planned_passes(model, subject, number, longest)],
        long=0.0 if long is None else long_passes(long, new_tokens, versions, prompts),
    )


def record_faults(
    models: TorchModels, costs: Sequence[float], advance: Advance
) -> tuple[list[RecordedPlace], list[dict[str, Any]]]:
    """The places of all questions, and the known faults there as the file of a reference has them.

    Args:
        costs: Passes of each fault.
        advance: Function that is told how many of them are done.
    """
    left = iter(costs)
    faults = [*each_done(main_faults(models), left, advance)]
    right = models.expected[BASE], models.expected[ADAPTER]
    places = choose_places(models.questions, right, faulty_tops(models, faults))
    more = each_done(many_faults(models), left, advance)
    return places, [fault.packed(places, models) for fault in chain(faults, more)]


def read_questions(base: ModelSource, file: Path | None, new_tokens: int) -> Prompts:
    """Questions of a file, or the built-in ones."""
    limit = getattr(load_config(base).get_text_config(), "max_position_embeddings", None) or LONGEST
    return read_prompts(base, file or QUESTIONS_FILE, longest=max(1, min(LONGEST, int(limit) - new_tokens)))


def digests(adapter: AdapterDir, base: ModelSource, tokenizer: Any, *, is_chat: bool) -> dict[str, str | None]:
    """Digests of everything that was recorded."""
    template = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest() if is_chat else None
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]))
    return {
        "adapter": adapter_digest(adapter.path),
        "base_config": model_digest(base, weights=False),
        "base_weights": model_digest(base, weights=True),
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "chat_template": template,
    }


def made(request: RecordRequest, source: str, device: str) -> dict[str, Any]:
    """Circumstances of a recording."""
    return {
        "command": request.command(),
        "date": today(),
        "device": device,
        "compute_dtype": request.compute_dtype,
        "prompts": source,
        "versions": environment("transformers", "peft"),
    }
