"""Prepare an adapter of any kind for an engine: look it up, or convert, export and publish it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from time import perf_counter

from loraover.adapters.convert.kind import named_base, why_convert
from loraover.adapters.uniform.certificate import CERTIFICATE_FILE, CONVERSION_FILE, LoraCertificate
from loraover.adapters.uniform.request_fields import max_lora_rank
from loraover.checkpoint.carried_files import misfit
from loraover.checkpoint.files import META_FILE, REFERENCE_FILE, TEMPLATE_FILE
from loraover.checkpoint.model_facts import read_facts
from loraover.checkpoint.source import read_source
from loraover.common.atomic_output import publish_directory
from loraover.common.errors import CheckpointError, ConfigError, ExportError, FoldError, LoraOverError
from loraover.common.later import has_torch
from loraover.common.request import as_written
from loraover.models.device import DTYPES
from loraover.models.load import ModelSource, resolve_model
from loraover_export.check.engines import ENGINES, engine_of
from loraover_export.check.engines.base import ADAPTER, Target, Written
from loraover_export.prepare.cache import (
    RECORD_FILE,
    Done,
    PreparedAdapter,
    Record,
    digest_of,
    file_states,
    locked,
    look_up,
    remembered,
)

if has_torch():  # a base installation prepares plain LoRAs only; threads must not import the others at once
    for _place in (
        "loraover_export.check.engines.vllm",
        "loraover.adapters.combine.combine",
        "loraover.adapters.convert.run",
        "loraover_export.fold.run",
        "loraover.adapters.numerics.rounding",
        "loraover_export.formats.vllm.run",
    ):
        import_module(_place)


@dataclass(frozen=True)
class RankLimits:
    """Limits of the rank.

    Args:
        largest: Largest rank that the engine takes; None if it names none.
        approximate: Rank of an approximation, where the exact LoRA has full or too large a rank; None refuses
            approximations.
    """

    largest: int | None
    approximate: int | None


def prepare_adapter(
    source: str | Path,
    cache: str | Path,
    *,
    model: str | Path,
    engine: str = "vllm",
    dtype: str = "bf16",
    max_lora_rank: int | None = None,
    approximate_to_rank: int | None = None,
    engine_version: str | None = None,
) -> PreparedAdapter:
    """Return an adapter of any kind in the form that an engine loads; it is made once and kept in a cache.

    A LoRA-Over checkpoint is folded, an adapter of another kind is converted, and the result is exported for the
    engine. The key is the SHA-256 of the adapter's files, of the base model's configuration and revision, of its
    weights where the result depends on them, of the options and of the versions. What is made is published whole
    under `cache/KEY`, so that any number of processes may share a cache: they wait for one another only where they
    need the same adapter. A refusal that lies in the adapter is remembered, and raised again at once. The function
    needs neither PEFT nor an engine, and it can be sent to other processes.

    Args:
        source: Folder of a LoRA-Over checkpoint, or of a PEFT adapter of any kind.
        cache: Folder of the cache, which is made if it is missing.
        model: Folder or hub name of the base model as the engine serves it; for ONNX Runtime, the folder of an earlier
            swappable export, which holds the graph.
        engine: Engine to prepare for, by the name that `loraover check --engine` takes.
        dtype: Data type to store A and B in: fp32, bf16 or fp16. Adapters for ONNX Runtime take that of the graph.
        max_lora_rank: Largest rank that the engine was started for, as vLLM's `--max-lora-rank`; None means the largest
            that the engine can be started for.
        approximate_to_rank: Rank to approximate where the exact LoRA has full or too large a rank; None refuses these.
        engine_version: Release of the engine, such as 0.33.0; None means the one whose sources the rules were read
            from.

    Returns:
        What to load, and what was done to make it.

    Raises:
        ConfigError: Options that cannot be used, or a base model that cannot be read.
        CheckpointError: An adapter that cannot be trusted, or whose files changed meanwhile.
        ExportError: An adapter that no exact LoRA can express, or that the engine would refuse or serve wrongly.
        FoldError: An element beyond the range of `dtype`.
        OutputError: A cache that cannot be written.
    """
    started = perf_counter()
    source, folder = Path(source).absolute(), Path(cache).absolute()
    target = Target(engine, str(model), dtype, engine_version)
    ranks = _check_options(target, max_lora_rank, approximate_to_rank)
    trained, name = named_base(source), engine_of(engine).base(target.model)
    base = resolve_model(name, trained.revision if trained.base_model_name_or_path == name else None)
    states = file_states(source)
    read = [*engine_of(engine).files(target.model), source / REFERENCE_FILE, source / TEMPLATE_FILE]
    folder /= digest_of(source, base, asdict(target) | asdict(ranks), read)
    found = look_up(folder, source)
    if found is not None:
        return found.opened(folder, perf_counter() - started, cached=True)
    with locked(folder):
        found = look_up(folder, source)  # another process made it meanwhile
        with remembered(folder, source, states):
            record = found or _publish(source, base, target, ranks, folder, states, started)
    return record.opened(folder, perf_counter() - started, cached=found is not None)


def _check_options(target: Target, max_lora_rank: int | None, approximate_to_rank: int | None) -> RankLimits:
    """Raise ConfigError with every option that cannot be used, or return the limits of the rank."""
    faults = []
    if target.engine not in ENGINES:
        faults.append(f"engine is {target.engine!r}, expected one of {', '.join(ENGINES)}.")
    if target.dtype not in DTYPES:
        faults.append(f"dtype is {target.dtype!r}, expected one of {', '.join(DTYPES)}.")
    for option, rank in (("max_lora_rank", max_lora_rank), ("approximate_to_rank", approximate_to_rank)):
        if rank is not None and rank < 1:
            faults.append(f"{option} is {rank}, expected 1 or more.")
    if faults:
        raise ConfigError(" ".join(faults))
    largest = engine_of(target.engine).largest_rank if max_lora_rank is None else max_lora_rank
    if approximate_to_rank is not None and largest is not None and approximate_to_rank > largest:
        raise ConfigError(f"approximate_to_rank is {approximate_to_rank}, but the engine takes rank {largest} at most.")
    return RankLimits(largest, approximate_to_rank)


def _publish(
    source: Path,
    base: ModelSource,
    target: Target,
    ranks: RankLimits,
    folder: Path,
    states: Mapping[str, tuple[int, ...]],
    started: float,
) -> Record:
    """Make an adapter's plain LoRA, write it for the engine, and publish both certificates with a record of it."""
    with publish_directory(folder, outside=source, replace=folder.exists()) as draft:  # a damaged one, under its lock
        between = (draft / "folded", draft / "converted")
        try:
            plain, conversion = _as_lora(source, base, target, ranks, *between)
            if conversion is not None:
                if not conversion.passed:
                    raise ExportError(
                        f"{plain}: the certificate of its conversion failed; choose a wider dtype, such as fp32."
                    )
                (plain / CERTIFICATE_FILE).rename(draft / CONVERSION_FILE)
            written = engine_of(target.engine).write(plain, draft, target)
            wrong = [matrix.name for matrix in written.matrices if not matrix.passed]
            if wrong:
                raise FoldError(
                    f"{plain}: {len(wrong)} of {len(written.matrices)} written matrices are outside their bounds, the "
                    f"first of them {wrong[0]}; choose a wider data type, such as fp32."
                )
        except LoraOverError as error:
            message = str(error)
            for gone in between:  # which nobody finds any more
                message = message.replace(str(gone), str(source))
            raise (error if message == str(error) else type(error)(message)) from error.__cause__
        record = _record(source, folder.name, target, written, conversion, perf_counter() - started)
        for gone in between:
            shutil.rmtree(gone, ignore_errors=True)
        (draft / ADAPTER / "README.md").unlink(missing_ok=True)  # its command line names the draft
        (draft / RECORD_FILE).write_text(record.model_dump_json(indent=1) + "\n")
        if file_states(source) != states:
            raise CheckpointError(f"{source}: its files changed while they were read; prepare it again.")
    return record


def _as_lora(
    source: Path, base: ModelSource, target: Target, ranks: RankLimits, folded: Path, converted: Path
) -> tuple[Path, LoraCertificate | None]:
    """Return the folder of an adapter that the export takes, and the certificate of a conversion if there was one."""
    reason = why_convert(source, read_facts(base).shapes())
    if reason is None:
        rank = read_source(source).rank
        if ranks.largest is None or rank <= ranks.largest:
            return source, None
        from loraover.adapters.combine.combine import shrink_adapter

        allowed = _approximation(source, rank, target, ranks)
        return converted, shrink_adapter(source, converted, rank=allowed, dtype=target.dtype)
    from loraover.adapters.convert.run import FullRankError, convert_adapter

    plain = source
    if (source / META_FILE).is_file():
        from loraover_export.fold.run import fold_checkpoint

        plain = folded
        fold_checkpoint(source, plain)
    model = engine_of(target.engine).base(target.model)
    convert = partial(convert_adapter, plain, converted, model=model, dtype=target.dtype)
    try:
        report = convert()
    except FullRankError as error:
        if ranks.approximate is None:
            raise ExportError(
                f"{source}: {reason}, which changes weights by matrices of full rank, so no LoRA is exact. To serve "
                "its best approximation, whose error the certificate states, allow a rank with "
                f"{as_written('approximate_to_rank')}."
            ) from error
        report = convert(approximate_to_rank=ranks.approximate)
    rank = report.certificate.rank
    if ranks.largest is not None and rank > ranks.largest:
        report = convert(approximate_to_rank=_approximation(source, rank, target, ranks), force=True)
    return converted, report.certificate


def _approximation(source: Path, rank: int, target: Target, ranks: RankLimits) -> int:
    """Return the rank to approximate an adapter of too large a rank, or raise ExportError if none is allowed."""
    if ranks.approximate is None:
        fitting, option = max_lora_rank(rank), engine_of(target.engine).rank_option
        larger = "" if fitting is None or option is None else f"start it with {option} {fitting}, or "
        raise ExportError(
            f"{source}: its rank is {rank}, and the engine takes {ranks.largest} at most; {larger}allow an "
            f"approximation with {as_written('approximate_to_rank')}."
        )
    return ranks.approximate


def _record(
    source: Path, digest: str, target: Target, written: Written, conversion: LoraCertificate | None, seconds: float
) -> Record:
    done: Done = "taken" if written.taken else "rewritten"
    error, notes = max(matrix.relative_error for matrix in written.matrices), []
    if conversion is not None:
        is_exact = all(module.truncation_error == 0 for module in conversion.modules)
        done = "converted" if is_exact else "approximated"
        error = max(module.relative_error_bound for module in conversion.modules)
        notes += conversion.notes
    reference = source / REFERENCE_FILE
    if reference.is_file():
        reason = "it belongs to the exact adapter" if done == "approximated" else misfit(reference)
        notes += [] if reason is None else [f"the reference was left out: {reason}"]
    return Record(
        digest=digest,
        engine=target.engine,
        adapter=written.name,
        rank=written.rank,
        done=done,
        notes=tuple(notes),
        certificate=written.certificate if conversion is None else CONVERSION_FILE,
        error=error,
        seconds=seconds,
    )
