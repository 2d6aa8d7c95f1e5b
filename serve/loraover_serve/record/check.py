"""Verification of servers by references, beside the one by PyTorch: one function, and little to import."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraover.checkpoint.files import REFERENCE_FILE
from loraover.client.endpoint import Endpoint
from loraover.common.atomic_output import check_file_writable, check_writable
from loraover.common.errors import CheckpointError, ConfigError, EngineError, LoraOverError
from loraover.sources.verb import verb
from loraover_serve.judge.names import ANOTHER, INTERMITTENT, NOT_APPLIED
from loraover_serve.record.adapter_check.asker import Asker
from loraover_serve.record.adapter_check.command import check, unanswered
from loraover_serve.record.adapter_check.reference import Reference, read_reference
from loraover_serve.record.crossed import Named, Search
from loraover_serve.record.sealed import check_seals
from loraover_serve.verify.request import VerifyRequest

MOST_BESIDE = 64
"""References beside those that are asked for that are looked at."""

if TYPE_CHECKING:
    from loraover_serve.verify.report import VerifyReport


@verb(VerifyRequest)
def verify_adapter(request: VerifyRequest) -> VerifyReport:
    """Verify that engines answer as an adapter was trained, and name the likely fault of one that does not.

    Each engine gets the adapter in the form that it needs, and answers the same prompts with the base model and with
    the adapter. Its answers are compared with those of PyTorch in float32: of the unfolded model for a LoRA-Over
    checkpoint, of PEFT for any other adapter of a causal language model, which is converted for the engines if it is no
    plain LoRA. The engine's distance on the base model is its noise. A server is asked for each of the two models again
    while it answers for the other one. The report's `verdict` is "as trained", "differs", "inconclusive" if the adapter
    moves the answers less than the noise, or "failed" if an engine failed after another had answered.

    With references, a running server is compared with PyTorch's answers that they hold, and PyTorch is not imported.

    Raises:
        ConfigError: Arguments that cannot be used, a task that is not a causal language model, or a base model that
            cannot be loaded.
        CheckpointError: Files that cannot be read as an adapter, a checkpoint, a reference or an ONNX export.
        DataError: A file of prompts that cannot be read.
        EngineError: An engine that is not installed, or every engine failed; the message names the logs that are kept.
        ExportError: An adapter that cannot be exported for the only engine, or a `graph` that it cannot be run on.
        OutputError: An output that exists or cannot be written.
        UnwrittenReportError: An output that could not be written after the verification; `error.report` has the report.
    """
    if not request.references:
        from loraover_serve.verify.run import verify_with_pytorch

        return verify_with_pytorch(request)
    return check_server(request)


def check_server(request: VerifyRequest) -> VerifyReport:
    """Verify a running server by references.

    Args:
        request: What the user asked for.

    Raises:
        ConfigError: Arguments that cannot be used, or names that the server does not have.
        CheckpointError: No file is a reference.
        EngineError: A server that failed for every adapter.
        OutputError: An output that exists or cannot be written.
    """
    if request.output is not None:
        check_writable(request.output)
    if request.junit is not None:
        check_file_writable(request.junit)
    known, found = ask_server(request, neighbours(request.references))
    from loraover_serve.record.outcome import publish, to_report  # with NumPy, which the requests do not need

    return publish(request, to_report(request, known, found))


def ask_server(
    request: VerifyRequest, others: Sequence[Named] = ()
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Ask a running server about one adapter after the other, with one reference in memory at a time.

    Args:
        request: What the user asked for.
        others: Further adapters that it may answer with.

    Returns:
        Facts of each reference that could be read, and the result of each adapter; a failure is a result, too.

    Raises:
        ConfigError: Arguments that cannot be used.
        CheckpointError: No file is a reference.
    """
    _endpoint(request)  # an address or a key that cannot be used is told first
    check_seals(request)
    known: list[dict[str, Any]] = []
    adapters: list[Named] = []
    found: list[dict[str, Any]] = []
    unread: list[CheckpointError] = []
    for name, file in _named(request, reference_files(request.references)):
        read = partial(read_reference, file)
        try:
            reference = read()
        except CheckpointError as error:
            unread.append(error)
            adapters.append(Named(name or str(file), read))
            found.append(_failed(adapters[-1].name, error))
            continue
        known.append(_facts(reference))
        adapters.append(Named(name or known[-1]["adapter"], read))
        found.append(_check(request, adapters[-1].name, reference))
    if not known:
        raise unread[0]
    name_crossed(request, [*adapters, *others], found)
    return known, found


def _facts(reference: Reference) -> dict[str, Any]:
    """The fields of a report that say what a reference holds; they are small, unlike the reference."""
    return {
        "adapter": reference.adapter_name,
        "base_model": reference.base_name,
        "sensitivity": reference.sensitivity,
        "bias": reference.formats["bf16"]["strength"],
        "prompts": len(reference.questions),
        "new_tokens": max(len(question["answer"]) for question in reference.questions),
        "device": reference.device,
    }


def _endpoint(request: VerifyRequest) -> Endpoint:
    """The server, with the time that one adapter may take."""
    assert request.endpoint is not None
    return Endpoint(
        request.endpoint,
        request.key_variable,
        timeout_s=request.timeout_s,
        more=request.headers,
        ca_file=None if request.ca_file is None else str(request.ca_file),
        ends=time.monotonic() + (math.inf if request.check_timeout_s is None else request.check_timeout_s),
    )


def _asker(request: VerifyRequest, endpoint: Endpoint, name: str, reference: Reference) -> Asker:
    return Asker(reference, endpoint, name, request.base_name, request.protocol, request.named)


def reference_files(places: Sequence[Path]) -> list[Path]:
    """Files of references: those that are named, and those below folders.

    Args:
        places: Files and folders.

    Raises:
        CheckpointError: A folder without any.
    """
    found = []
    for place in places:
        files = sorted(place.rglob(f"*{REFERENCE_FILE}")) if place.is_dir() else [place]
        if not files:
            raise CheckpointError(f"{place}: holds no {REFERENCE_FILE}; `loraover record` writes one.")
        found += files
    return found


def neighbours(files: Sequence[Path]) -> list[Named]:
    """The newest other references in the folders beside those of files, whose adapters may be served instead.

    Args:
        files: References; folders hold all that are meant.
    """
    mine = {file.resolve() for file in files if file.is_file()}
    beside = {path for file in mine for path in file.parent.parent.glob(f"*/{REFERENCE_FILE}")} - mine
    newest = sorted(beside, key=lambda path: path.stat().st_mtime, reverse=True)[:MOST_BESIDE]
    return [Named(path.parent.name, partial(read_reference, path)) for path in newest]


def _named(request: VerifyRequest, files: Sequence[Path]) -> Iterator[tuple[str | None, Path]]:
    names = request.served_name
    if names and len(names) != len(files):
        given = request.named("served_name")
        raise ConfigError(f"{given}: {len(names)}, and there are {len(files)} references; name all of them or none.")
    return zip_longest(names, files)


def _check(request: VerifyRequest, name: str, reference: Reference) -> dict[str, Any]:
    """Result of one adapter; a failure is a result beside those of the others."""
    request.report.line(f"asking {request.endpoint} for {name}")
    start, endpoint = time.monotonic(), _endpoint(request)
    try:
        asker = _asker(request, endpoint, name, reference)
        return {"engine": name} | _asked(request, asker, is_quick=request.quick) | {"requests": endpoint.sent}
    except (ConfigError, EngineError) as error:
        return _failed(name, error, time.monotonic() - start, endpoint.sent)


def _failed(name: str, error: LoraOverError, seconds: float = 0.0, requests: int = 0) -> dict[str, Any]:
    return {"engine": name} | unanswered(error) | {"seconds": seconds, "requests": requests}


def _asked(request: VerifyRequest, asker: Asker, *, is_quick: bool) -> dict[str, Any]:
    more = {"is_quick": is_quick, "without_mixed": request.without_mixed}
    return check(asker, request.declared_format, request.named, repeats=request.repeats, **more)


def name_crossed(
    request: VerifyRequest, adapters: Sequence[Named], found: Sequence[dict[str, Any]], most: int | None = None
) -> None:
    """Name the adapter with which a server answers instead of one that differs, where it is one of these.

    Args:
        request: What the user asked for.
        adapters: Adapters that the server serves, the checked ones first.
        found: Results of the checked ones, of which fault, reason and number of requests change.
        most: Largest number of adapters by whose references the server is checked; None means all that may be it.
    """
    searches: list[tuple[Named, dict[str, Any], Search]] = []
    for mine, result in zip(adapters, found, strict=False):
        if result["verdict"] == "differs" and result["fault"] not in (NOT_APPLIED, INTERMITTENT) and adapters[1:]:
            with _again(request, result) as endpoint:
                searches.append((mine, result, Search(_asker(request, endpoint, mine.name, mine.read()))))
    for other in adapters if searches else ():
        with suppress(CheckpointError):  # what is no reference names nothing
            reference = other.read()
            for search in (search for mine, _, search in searches if mine is not other):
                search.compare(other, reference)
    for mine, result, search in searches:
        with _again(request, result) as endpoint:
            for name, read in search.nearest()[:most]:
                if _answers_as(request, _asker(request, endpoint, mine.name, read())):
                    result["fault"] = ANOTHER
                    result["reason"] = f"{ANOTHER}: answers as {name} was trained ({result['reason']})"
                    break


@contextmanager
def _again(request: VerifyRequest, result: dict[str, Any]) -> Iterator[Endpoint]:
    """The server once more; what it refuses now, it answered before: the verdict is known."""
    endpoint = _endpoint(request)
    with suppress(ConfigError, EngineError):
        yield endpoint
    result["requests"] += endpoint.sent


def _answers_as(request: VerifyRequest, asker: Asker) -> bool:
    """Whether a server answers as a reference has it; a few requests exclude most."""
    steps = (True,) if request.quick else (True, False)
    return all(_asked(request, asker, is_quick=is_quick)["verdict"] == "as trained" for is_quick in steps)
