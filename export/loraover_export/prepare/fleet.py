"""Check or prepare many adapters."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

from loraover.adapters.convert.source import read_peft_type
from loraover.common.atomic_output import check_file_writable, publish_file
from loraover.common.errors import ConfigError, LoraOverError, OutputError
from loraover.common.extras import install, missing_package
from loraover.common.later import has_torch
from loraover.common.paths import without_secrets
from loraover.common.strict_json import read_json
from loraover.sources.address import is_elsewhere
from loraover.sources.fetch import Fetched, fetch_adapter
from loraover.sources.verb import verb
from loraover_export.check.engines import engine_of
from loraover_export.check.request import FleetCheckRequest, PrepareRequest
from loraover_export.prepare.cache import RECORD_FILE, REMEMBERED, Record
from loraover_export.prepare.report import FleetReport, FleetRow, to_page

PAGE = "prepare.html"
MINUTE_S = 60

Item = TypeVar("Item")
Result = TypeVar("Result")

Examine = Callable[[Fetched, str], FleetRow]
"""Work on one adapter, given its folder and the text by which it was named, without secrets."""


def guarded(examine: Examine, source: str) -> FleetRow:
    """Return the row of an adapter under its address; an error in the work on it becomes a row too."""
    started, row = perf_counter(), _failed(source)
    try:
        fetched = fetch_adapter(source, lambda line: None)
        fetched = Fetched(fetched.folder, without_secrets(fetched.address))
        row = row.model_copy(update={"address": fetched.address})
        row = row.model_copy(update={"kind": read_peft_type(fetched.folder)})
        row = examine(fetched, row.source)
    except LoraOverError as error:
        is_its_own = isinstance(error, tuple(REMEMBERED.values())) and not isinstance(error, ConfigError | OutputError)
        is_there = row.address == row.source
        reason = str(error) if is_there else str(error).replace(str(fetched.folder), fetched.address)
        row = row.model_copy(update={"verdict": "refused" if is_its_own else "failed", "reason": reason})
    except Exception as error:  # one adapter must not end the others, whatever a library makes of it
        reason = missing_package(error) or f"{type(error).__name__}: {without_secrets(str(error))}. Please report this."
        row = row.model_copy(update={"reason": reason})
    return row.model_copy(update={"seconds": perf_counter() - started})


def _failed(source: str, reason: str = "") -> FleetRow:
    shown = without_secrets(source)
    return FleetRow(source=shown, address=shown, verdict="failed", reason=reason)


@verb(PrepareRequest)
def prepare_fleet(request: PrepareRequest) -> FleetReport:
    """Prepare many adapters for an engine, in a cache; see `prepare_adapter`.

    Returns:
        A row for each adapter. One that is refused, or cannot be read, does not stop the others.

    Raises:
        ConfigError: An argument that cannot be used, or an engine whose extra is not installed.
        OutputError: A cache or a page that cannot be written.
    """
    named, rules = request.named("engine", request.engine), engine_of(request.engine)
    if rules.extra is not None and not has_torch():
        raise ConfigError(f"{named} needs PyTorch: {install(rules.extra)}")
    if rules.model_is is not None and request.model is None:
        raise ConfigError(f"{named} needs {request.named('model')}: {rules.model_is}.")
    cache = request.cache.absolute()
    options = {
        "engine": request.engine,
        "dtype": request.dtype,
        "max_lora_rank": request.max_lora_rank,
        "approximate_to_rank": request.approximate_to_rank,
    }
    check_file_writable(cache / PAGE, parents=True)
    work = partial(prepared_row, cache=str(cache), model=request.model, options=options)
    return _run(work, request, request.html or cache / PAGE)


@verb(FleetCheckRequest)
def check_fleet(request: FleetCheckRequest) -> FleetReport:
    """Check many adapters for several engines without running any; see `check_adapter`.

    Returns:
        A row for each adapter. One that cannot be read does not stop the others.

    Raises:
        ConfigError: An argument that cannot be used.
        OutputError: A page that cannot be written.
    """
    work = partial(checked_row, engines=request.engines, model=request.model)
    return _run(work, request, request.html)


def prepared_row(fetched: Fetched, source: str, *, cache: str, model: str | None, options: dict[str, Any]) -> FleetRow:
    """Prepare one adapter, and return its row; the errors are those of `prepare_adapter`."""
    from loraover.adapters.convert.kind import named_base
    from loraover_export.prepare.run import prepare_adapter

    config = named_base(fetched.folder)
    named = model or config.base_model_name_or_path
    if named is None or (model is None and is_elsewhere(named)):
        found = "no base model" if named is None else f"the base model {named}"
        raise ConfigError(f"{source}: names {found}; name one that you trust with --model.")
    prepared = prepare_adapter(fetched.folder, cache, model=named, **options)
    record = read_json(Path(cache) / prepared.digest / RECORD_FILE, Record)
    return FleetRow(
        source=source,
        address=fetched.address,
        verdict="prepared",
        kind=config.peft_type,
        rank=prepared.rank,
        error=record.error,
        done=" ".join((prepared.done, *prepared.notes)),
        path=str(prepared.path),
        cached=prepared.cached,
    )


def checked_row(fetched: Fetched, source: str, *, engines: tuple[str, ...], model: str | None) -> FleetRow:
    """Check one adapter, and return its row; the errors are those of `check_adapter`."""
    from loraover_export.check.run import check_adapter

    report = check_adapter(fetched.folder, engines=engines, model=model)
    found: dict[str, list[str]] = {}
    for check in report.engines:
        for finding in check.as_it_is.findings:
            if finding.level != "note":
                found.setdefault(f"{finding.level}: {finding.found}", []).append(check.engine)
    mended = [check.engine for check in report.engines if check.is_mended]
    row = FleetRow(
        source=source,
        address=fetched.address,
        verdict="refused",
        kind=report.peft_type,
        rank=max(report.ranks, default=None),
        done=f"the export fixes it for {', '.join(mended)}" if mended else "",
        reason="\n".join(f"{', '.join(engines)}: {text}" for text, engines in found.items()),
        engines={check.engine: check.as_it_is.verdict for check in report.engines},
        exported={check.engine: check.by_us.verdict for check in report.engines},
    )
    if not report.passed:
        return row
    forms = {row.served(engine) for engine in row.engines}
    verdict = "right on some" if "in no form" in forms else "right as exported" if "as exported" in forms else "right"
    return row.model_copy(update={"verdict": verdict})


def _run(work: Examine, request: FleetCheckRequest | PrepareRequest, page: Path | None) -> FleetReport:
    sources, started = tuple(dict.fromkeys(request.sources)), perf_counter()
    if page is not None:
        check_file_writable(page, parents=True)
    killed = "the system killed its process, probably for lack of memory; use fewer jobs, or more memory."
    rows: dict[str, FleetRow] = {}
    with request.report.task("adapters", len(sources)) as progress:
        for source, row in each(partial(guarded, work), sources, request.jobs, partial(_failed, reason=killed)):
            rows[source] = row
            progress(len(rows))
            left = (perf_counter() - started) / len(rows) * (len(sources) - len(rows))
            in_words = f"{left:.0f} s" if left < 2 * MINUTE_S else f"{left / MINUTE_S:.0f} min"
            request.receive(row, f"{len(rows)} of {len(sources)}, {in_words} left")
    report = FleetReport(rows=[rows[source] for source in sources], seconds=perf_counter() - started)
    if page is not None:
        html = to_page(report, request.command()).html
        publish_file(page, lambda draft: draft.write_text(html, encoding="utf-8"), parents=True)
    return report


def each(
    work: Callable[[Item], Result], items: Iterable[Item], jobs: int, killed: Callable[[Item], Result]
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with its result, as soon as there is one.

    A process that is killed, such as by a system without memory, takes the items of its pool along. These are tried
    again one at a time, each in a process of its own, so that the one that kills it is known.

    Args:
        work: Function that is called with an item, in this process or another.
        items: Items of the work.
        jobs: Number of processes; 1 means this process.
        killed: Function that gives the result of an item whose process was killed.
    """
    if jobs == 1:
        for item in items:
            yield item, work(item)
        return
    waiting = deque(items)
    while waiting:
        lost: list[Item] = []
        with _pool(min(jobs, len(waiting))) as pool:
            yield from _until_broken(pool, work, waiting, jobs, lost)
        for item in lost:
            with _pool(1) as alone:
                try:
                    result = alone.submit(work, item).result()
                except BrokenProcessPool:
                    result = killed(item)
            yield item, result


def _until_broken(
    pool: ProcessPoolExecutor, work: Callable[[Item], Result], waiting: deque[Item], jobs: int, lost: list[Item]
) -> Iterator[tuple[Item, Result]]:
    """Take items from `waiting` and yield their results; where the pool breaks, add those that were begun to `lost`."""
    running: dict[Future[Result], Item] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            item = waiting.popleft()
            try:
                running[pool.submit(work, item)] = item
            except BrokenProcessPool:
                lost += [item, *running.values()]
                return
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        broken = [future for future in done if isinstance(future.exception(), BrokenProcessPool)]
        for future in done - {*broken}:
            yield running.pop(future), future.result()
        if broken:
            lost += running.values()
            return


def _pool(jobs: int) -> ProcessPoolExecutor:
    """Return a pool of spawned processes: a fork of a process that has threads, as PyTorch makes them, may hang."""
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
