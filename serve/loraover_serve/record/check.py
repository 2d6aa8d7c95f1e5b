"""Verification of servers by references, beside the one by PyTorch: one function, and little to import."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraover.checkpoint.reference_file import REFERENCE_FILE
from loraover.client.endpoint import Endpoint
from loraover.common.errors import CheckpointError, ConfigError, EngineError
from loraover.common.verb import perform, verb
from loraover_serve.judge.names import ANOTHER, INTERMITTENT, NOT_APPLIED
from loraover_serve.record.adapter_check.asker import Asker
from loraover_serve.record.adapter_check.command import check
from loraover_serve.record.adapter_check.reference import Reference, read_reference
from loraover_serve.record.crossed import Named, nearest
from loraover_serve.record.sealed import check_seals
from loraover_serve.verify.request import VerifyRequest

if TYPE_CHECKING:
    from loraover_serve.verify.report import VerifyReport


@verb(VerifyRequest)
def verify_adapter(request: VerifyRequest) -> VerifyReport:
    """Verify that engines answer as an adapter was trained, and name the likely fault of one that does not.

    Each engine gets the adapter in the form that it needs, and answers the same prompts with the base model and with
    the adapter. Its answers are compared with those of PyTorch in float32: of the unfolded model for a LoRA-Over
    checkpoint, of PEFT for any other LoRA of a causal language model. The engine's distance on the base model is its
    noise. A server is asked for each of the two models again while it answers for the other one. The report's `verdict`
    is "as trained", "differs", "inconclusive" if the adapter moves the answers less than the noise, or "failed" if an
    engine failed after another had answered.

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

        return perform(verify_with_pytorch, request)
    return check_server(request)


def check_server(request: VerifyRequest) -> VerifyReport:
    """Verify a running server by references.

    Args:
        request: What the user asked for.

    Raises:
        ConfigError: Arguments that cannot be used, or names that the server does not have.
        CheckpointError: A file that is no reference.
        EngineError: A server that failed for every adapter.
    """
    references, found = ask_server(request)
    from loraover_serve.record.outcome import publish, to_report  # with NumPy, which the requests do not need

    return publish(request, to_report(request, references, found))


def ask_server(request: VerifyRequest) -> tuple[list[Reference], list[dict[str, Any]]]:
    """Ask a running server, and return the references with the result of each; one that failed is a result, too.

    Args:
        request: What the user asked for.

    Raises:
        ConfigError: Arguments that cannot be used.
        CheckpointError: A file that is no reference.
    """
    _endpoint(request)  # an address or a key that cannot be used is told first
    check_seals(request)
    references = read_all(request.references)
    found = [_check(request, name, mine) for name, mine in _named(request, references)]
    _find_crossed(request, references, found)
    return references, found


def _endpoint(request: VerifyRequest) -> Endpoint:
    """The server, with the time that one adapter may take."""
    assert request.endpoint is not None
    return Endpoint(
        request.endpoint,
        request.endpoint_key_variable,
        timeout_s=request.timeout_s,
        more=request.headers,
        ca_file=None if request.ca_file is None else str(request.ca_file),
        ends=time.monotonic() + request.timeout_s,
    )


def _asker(request: VerifyRequest, endpoint: Endpoint, name: str, reference: Reference) -> Asker:
    return Asker(reference, endpoint, name, request.base_name, request.protocol, request.named)


def read_all(places: Sequence[Path]) -> list[Reference]:
    """References of files, and of the folders below which they are.

    Args:
        places: Files and folders.

    Raises:
        CheckpointError: A file that is no reference, or a folder without any.
    """
    found = []
    for place in places:
        files = sorted(place.rglob(f"*{REFERENCE_FILE}")) if place.is_dir() else [place]
        if not files:
            raise CheckpointError(f"{place}: holds no {REFERENCE_FILE}; `loraover serve record` writes one.")
        found += [read_reference(file) for file in files]
    return found


def _named(request: VerifyRequest, references: Sequence[Reference]) -> Iterator[tuple[str, Reference]]:
    names = request.served_name
    if names and len(names) != len(references):
        given = request.named("served_name")
        raise ConfigError(
            f"{given}: {len(names)}, and there are {len(references)} references; name all of them or none."
        )
    for name, reference in zip_longest(names, references):
        yield name or str(reference.content["adapter"]), reference


def _check(request: VerifyRequest, name: str, reference: Reference) -> dict[str, Any]:
    """Result of one adapter; a failure is a result beside those of the others."""
    request.report.line(f"asking {request.endpoint} for {name}")
    start, endpoint = time.monotonic(), _endpoint(request)
    try:
        asker = _asker(request, endpoint, name, reference)
        return {"engine": name} | _asked(request, asker, is_quick=request.quick) | {"requests": endpoint.sent}
    except (ConfigError, EngineError) as error:
        seconds = time.monotonic() - start
        failed = {"engine": name, "verdict": "failed", "reason": str(error), "seconds": seconds}
        return failed | {"requests": endpoint.sent}


def _asked(request: VerifyRequest, asker: Asker, *, is_quick: bool) -> dict[str, Any]:
    more = {"is_quick": is_quick, "without_mixed": request.without_mixed}
    return check(asker, request.declared_format, request.named, repeats=request.repeats, **more)


def _find_crossed(request: VerifyRequest, references: Sequence[Reference], found: Sequence[dict[str, Any]]) -> None:
    """Name the adapter with which a server answers instead, where it is one of those that are checked."""
    adapters = [(str(result["engine"]), partial(references.__getitem__, index)) for index, result in enumerate(found)]
    for index, result in enumerate(found):
        name_crossed(request, references[index], adapters[:index] + adapters[index + 1 :], result)


def name_crossed(
    request: VerifyRequest,
    reference: Reference,
    others: Sequence[Named],
    result: dict[str, Any],
    most: int | None = None,
) -> None:
    """Name the adapter with which a server answers instead, where it is one of these.

    Args:
        request: What the user asked for.
        reference: The reference by which the adapter was checked.
        others: The other adapters that the server serves.
        result: Result of that check, whose fault, reason and number of requests change.
        most: Largest number of adapters by whose references the server is checked; None means all that may be it.
    """
    if not others or result["verdict"] != "differs" or result["fault"] in (NOT_APPLIED, INTERMITTENT):
        return
    endpoint = _endpoint(request)
    with suppress(ConfigError, EngineError):  # what the server refuses now, it answered before: the verdict is known
        asker = _asker(request, endpoint, result["engine"], reference)
        for name, read in nearest(asker, others)[:most]:
            if _answers_as(request, _asker(request, endpoint, result["engine"], read())):
                result["fault"] = ANOTHER
                result["reason"] = f"{ANOTHER}: answers as {name} was trained ({result['reason']})"
                break
    result["requests"] += endpoint.sent


def _answers_as(request: VerifyRequest, asker: Asker) -> bool:
    """Whether a server answers as a reference has it; a few requests exclude most."""
    steps = (True,) if request.quick else (True, False)
    return all(_asked(request, asker, is_quick=is_quick)["verdict"] == "as trained" for is_quick in steps)
