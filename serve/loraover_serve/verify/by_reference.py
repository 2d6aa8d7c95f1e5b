"""Verification of running servers by references, without PyTorch."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from loraover.checkpoint.files import REFERENCE_FILE
from loraover.client.endpoint import Endpoint
from loraover.common.errors import CheckpointError, ConfigError, DataError, EngineError, LoraOverError
from loraover_serve.judge.asker import Asker, screened, screened_distance
from loraover_serve.judge.caches import ask_warm, beside
from loraover_serve.judge.churn import ChurnRequest, ask_in_churn
from loraover_serve.judge.command import CheckOptions, check, check_reference, find_asker, unanswered
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.names import ANOTHER, IN_CHURN, INTERMITTENT, NOT_APPLIED, STALE_CACHES, TEMPLATE
from loraover_serve.judge.own_prompts import OwnPrompts
from loraover_serve.judge.reference import Reference, read_reference
from loraover_serve.judge.results import Caches, Churn
from loraover_serve.judge.rules import ALIKE
from loraover_serve.judge.user_command import UserCommand
from loraover_serve.judge.vectors.reference import VectorReference, read_any_reference
from loraover_serve.verify.request import VerifyRequest

MOST_BESIDE = 64
"""Largest number of references that are read beside the requested ones."""
NEAREST = 3
"""Number of references by which a server is checked, among those with the same questions."""
SHARED = 3
"""Fewest of the SCREENED questions that a reference has to have."""

OF_THE_SERVER = (NOT_APPLIED, INTERMITTENT, TEMPLATE, *STALE_CACHES, *IN_CHURN)
"""Faults that no other adapter explains."""

SEALED = "sealed"
"""Name of the digest in a published reference."""


WITHOUT_REFERENCE = "whether the weights are right: this needs a reference, which `loraover record` writes"

Part = TypeVar("Part", Caches, Churn)


class Named(NamedTuple):
    """An adapter on a server.

    Args:
        name: Its name there.
        read: Function that returns its reference: hundreds do not fit into memory together.
    """

    name: str
    read: Callable[[], Reference]


class Search:
    """The search for the adapter with which a server answers in the place of another one.

    The server is asked SCREENED questions, however many adapters there are.

    Args:
        asker: The server, with the reference by which it differs.
    """

    def __init__(self, asker: Asker) -> None:
        mine = asker.models
        self._weights = mine.weights_sha256 if isinstance(mine, Reference) else None
        self._answers = screened(asker, ADAPTER)
        self._right = screened_distance(mine, ADAPTER, self._answers, SHARED) or math.inf
        self._nearer: list[tuple[float, Named]] = []
        self._unknown: list[Named] = []

    def compare(self, other: Named, reference: Reference) -> None:
        """Compare the answers with those of another adapter; one that is further off than the right one is left out.

        Args:
            other: The adapter.
            reference: Its reference.
        """
        far = screened_distance(reference.on_weights(self._weights), ADAPTER, self._answers, SHARED)
        if math.isinf(far):
            self._unknown.append(other)
        elif far < self._right:
            self._nearer.append((far, other))

    def nearest(self) -> list[Named]:
        """Adapters with which the server may answer: the nearest first, and then those with other questions."""
        known = sorted(self._nearer, key=lambda pair: pair[0])
        return [other for _, other in known[:NEAREST]] + self._unknown


def ask_server(
    request: VerifyRequest, others: Sequence[Named] = ()
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Ask a running server about one adapter after the other, with one reference in memory at a time.

    Args:
        others: Further adapters that it may answer with.

    Returns:
        Facts of each reference that could be read, and the result of each adapter; a failure is a result, too.

    Raises:
        ConfigError: Arguments that cannot be used.
        CheckpointError: No file is a reference.
    """
    endpoint_of(request)  # an address or a key that cannot be used is told first
    check_seals(request)
    known: list[dict[str, Any]] = []
    adapters: list[Named] = []
    found: list[dict[str, Any]] = []
    unread: list[CheckpointError] = []
    for name, file in named_files(request):
        read = partial(read_reference, file)
        try:
            reference = read_any_reference(file)
        except CheckpointError as error:
            unread.append(error)
            adapters.append(Named(name or str(file), read))
            found.append(_failed(adapters[-1].name, error))
            continue
        known.append(reference.facts)  # which are small, unlike the reference
        adapters.append(Named(name or reference.adapter_name, read))
        found.append(_ask_about(request, adapters[-1].name, reference))
    if not known:
        raise unread[0]
    name_crossed(request, [*adapters, *others], found)
    return known, found


def _ask_about(request: VerifyRequest, name: str, reference: Reference | VectorReference) -> dict[str, Any]:
    """Ask a running server about one adapter; a failure is a result beside those of the others."""
    request.report.line(f"asking {request.endpoint} for {name}")
    start, endpoint = time.monotonic(), endpoint_of(request)
    try:
        found = check_reference(reference, endpoint, name, _options(request))
        return {"engine": name} | found | {"requests": endpoint.sent}
    except (ConfigError, EngineError) as error:
        return _failed(name, error, time.monotonic() - start, endpoint.sent)


def _options(request: VerifyRequest) -> CheckOptions:
    return CheckOptions.of(request, served_format=request.declared_format, option=request.named)


def ask_without_reference(request: VerifyRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ask a running server the user's own prompts, and compare its answers with one another.

    Returns:
        Facts of the comparison, and the result, whose best verdict is *consistent*: the weights are not judged.

    Raises:
        DataError: A file of prompts that cannot be read.
        ConfigError, EngineError: The server cannot be asked.
    """
    assert request.prompts is not None
    try:
        lines = request.prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{request.prompts}: cannot be read as UTF-8 text: {error}.") from error
    texts, (name,) = [line for line in lines if line.strip()], request.served_name
    if not texts:
        raise DataError(f"{request.prompts}: holds no prompt, expected one a line.")
    start, endpoint = time.monotonic(), endpoint_of(request)
    asker = Asker.of(
        OwnPrompts(texts, name, request.base_name or ""),
        endpoint,
        name,
        request.base_name,
        request.protocol,
        request.named,
    )
    reload = None if request.reload is None else UserCommand(request.reload, request.named("reload"), endpoint.hidden)
    found: dict[str, Any] = {"engine": name, "verdict": "consistent", "reason": "", "fault": None}
    found["not_checked"] = [WITHOUT_REFERENCE]
    if request.caches or reload is not None:
        found = beside(found, "caches", _consistent(ask_warm(asker, reload)))
    if request.churn_s is not None:
        run = None if request.run is None else UserCommand(request.run, request.named("run"), endpoint.hidden)
        churn = ask_in_churn(
            asker, ChurnRequest(asker.models, request.churn_s, run), with_base=not request.without_mixed
        )
        found = beside(found, "churn", _consistent(churn))
    facts = {
        "adapter": name,
        "base_model": asker.names[BASE],
        "sensitivity": asker.models.sensitivity,
        "bias": 1.0,
        "prompts": len(texts),
        "new_tokens": 1,
        "device": "no device",
    }
    return facts, found | {"seconds": time.monotonic() - start, "requests": endpoint.sent}


def _consistent(part: Part) -> Part:
    """A part of the check, whose pass says nothing about the weights."""
    return replace(part, verdict="consistent") if part.verdict == "as trained" else part


def endpoint_of(request: VerifyRequest) -> Endpoint:
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


def reference_files(places: Sequence[Path]) -> list[Path]:
    """Files of references: those that are named, and those below folders."""
    found = []
    for place in places:
        files = sorted(place.rglob(f"*{REFERENCE_FILE}")) if place.is_dir() else [place]
        if not files:
            raise CheckpointError(f"{place}: holds no {REFERENCE_FILE}; `loraover record` writes one.")
        found += files
    return found


def named_files(request: VerifyRequest) -> list[tuple[str | None, Path]]:
    """Files of the references, each with the name that was given to its adapter, if any was."""
    files, names = reference_files(request.references), request.served_name
    if names and len(names) != len(files):
        given = request.named("served_name")
        raise ConfigError(f"{given}: {len(names)}, and there are {len(files)} references; name all of them or none.")
    return list(zip_longest(names, files))


def neighbours(files: Sequence[Path]) -> list[Named]:
    """The newest other references in the folders beside those of files, whose adapters may be served instead."""
    mine = {file.resolve() for file in files if file.is_file()}
    beside = {path for file in mine for path in file.parent.parent.glob(f"*/{REFERENCE_FILE}")} - mine
    newest = sorted(beside, key=lambda path: path.stat().st_mtime, reverse=True)[:MOST_BESIDE]
    return [Named(path.parent.name, partial(read_reference, path)) for path in newest]


def _failed(name: str, error: LoraOverError, seconds: float = 0.0, requests: int = 0) -> dict[str, Any]:
    return {"engine": name} | unanswered(error) | {"seconds": seconds, "requests": requests}


def name_crossed(
    request: VerifyRequest, adapters: Sequence[Named], found: Sequence[dict[str, Any]], most: int | None = None
) -> None:
    """Name the adapter that a server serves in place of one that differs, if it is one of the given adapters.

    Args:
        adapters: Adapters that the server serves, the checked ones first.
        found: Results of the checked ones, whose fault, reason, list and number of requests are changed.
        most: Largest number of adapters by whose references the server is checked; None means all that may be it.
    """
    options, searches = _options(request), list[tuple[Named, dict[str, Any], Search]]()
    for mine, result in zip(adapters, found, strict=False):
        is_named = result["fault"] in OF_THE_SERVER or result.get("compared") == "vectors"
        if result["verdict"] == "differs" and not is_named and adapters[1:]:
            with _again(request, result) as endpoint:
                searches.append((mine, result, Search(find_asker(mine.read(), endpoint, mine.name, options))))
    for other in adapters if searches else ():
        with suppress(CheckpointError):  # what is no reference names nothing
            reference = other.read()
            for search in (search for mine, _, search in searches if mine is not other):
                search.compare(other, reference)
    for mine, result, search in searches:
        with _again(request, result) as endpoint:
            for name, read in search.nearest()[:most]:
                if _answers_as(find_asker(read(), endpoint, mine.name, options), options):
                    result["fault"] = ANOTHER
                    result["reason"] = f"{ANOTHER}: the server answers as {name} was trained"
                    result["not_checked"] = [each for each in result["not_checked"] if not each.startswith(ALIKE)]
                    break


@contextmanager
def _again(request: VerifyRequest, result: dict[str, Any]) -> Iterator[Endpoint]:
    """The server once more; what it refuses now, it answered before: the verdict is known."""
    endpoint = endpoint_of(request)
    with suppress(ConfigError, EngineError):
        yield endpoint
    result["requests"] += endpoint.sent


def _answers_as(asker: Asker, options: CheckOptions) -> bool:
    """Whether a server answers as a reference has it, which this lets go; a few requests exclude most."""
    steps = (True,) if options.quick else (True, False)
    found = (check(asker, replace(options, quick=quick, without_template=True)) for quick in steps)
    return all(each["verdict"] == "as trained" for each in found)


def check_seals(request: VerifyRequest) -> None:
    """Check each reference that a published one seals: the one that is named, or one that lies beside it."""
    for place in request.references:
        published, beside = request.published, place.parent / REFERENCE_FILE
        if published is None and place.is_file() and not place.name.endswith(REFERENCE_FILE) and beside.is_file():
            mine, digests = _digests(place), _digests(beside)
            published = beside if SEALED in digests and digests["adapter"] == mine["adapter"] else None
        if published is not None:
            check_seal(place, published)
            request.report.line(f"{place} is the sealed reference that {published} names")


def check_seal(sealed: Path, published: Path) -> None:
    """Check that a published reference names the SHA-256 of a sealed one."""
    named = _digests(published).get(SEALED)
    if named is None:
        raise CheckpointError(f"{published}: names no sealed reference, so nothing shows when {sealed} was made.")
    try:
        found = hashlib.sha256(sealed.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{sealed}: cannot be read: {error.strerror}.") from error
    if found != named:
        raise CheckpointError(
            f"{sealed}: its SHA-256 is {found}, and {published} names {named}; it was changed, or seals another "
            "adapter. Ask for the file that was published."
        )


def _digests(path: Path) -> Mapping[str, str]:
    from loraover.checkpoint.carried_files import reference_digests  # with all that reads adapters

    return reference_digests(path)
