"""Prepare an adapter of any kind for an engine: look it up, or convert, export and publish it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from pydantic import BaseModel

from loraover.adapters.convert.need import named_base, why_convert
from loraover.adapters.numerics.matrix_certificate import MatrixCertificate
from loraover.adapters.uniform.certificate import CERTIFICATE_FILE, CONVERSION_FILE, LoraCertificate, record_source
from loraover.adapters.uniform.rank_limits import max_lora_rank
from loraover.checkpoint.carried_reference import misfit
from loraover.checkpoint.files import META_FILE, REFERENCE_FILE, TEMPLATE_FILE
from loraover.checkpoint.read_facts import read_facts
from loraover.checkpoint.source import read_source
from loraover.common.atomic_output import publish_directory
from loraover.common.dtypes import DTYPES
from loraover.common.errors import CheckpointError, ConfigError, ExportError, FoldError, LoraOverError, OutputError
from loraover.common.file_lock import hold_lock
from loraover.common.later import has_torch
from loraover.common.request import as_written
from loraover.common.strict_json import read_json
from loraover.models.load import ModelSource, resolve_model
from loraover_export.check.engines import ENGINES, engine_of
from loraover_export.check.engines.base import ADAPTER, Target, Written
from loraover_export.prepare.key import digest_of, file_states
from loraover_export.prepare.prepared import RECORD_FILE, Done, PreparedAdapter, Record
from loraover_export.prepare.refusal import Refusal, refusal_of, remember

if has_torch():  # a base installation prepares plain LoRAs only; threads must not import the others at once
    for _place in (
        "loraover_export.check.engines.vllm",
        "loraover.adapters.combine.shrink",
        "loraover.adapters.convert.run",
        "loraover_export.fold.run",
        "loraover.adapters.numerics.rounded_adapter",
        "loraover_export.vllm.run",
    ):
        import_module(_place)

Contents = TypeVar("Contents", bound=BaseModel)

LOCKS = "locks"
"""Folder of the cache with a lock for each key that is or was being made."""


@dataclass(frozen=True)
class RankLimits:
    """Limits of the rank.

    Args:
        largest: Largest rank that the engine takes; None if it names none.
        approximate: Rank that may be approximated where the exact LoRA has none, or too large a one; None if nothing
            may be lost.
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
    """Return an adapter of any kind in the form that an engine loads, which is made once and kept in a cache.

    A LoRA-Over checkpoint is folded, an adapter of another kind is converted, and the result is exported for the
    engine. The key is the SHA-256 of the adapter's files, of the base model's configuration and revision, of its
    weights where the result depends on them, of the options and of the versions. What is made is published whole
    under `cache/KEY`, so that any number of processes may share a cache: they wait for one another only where they
    need the same adapter. A refusal that lies in the adapter is remembered, and raised again at once.

    The function needs neither PEFT nor an engine, and it can be sent to other processes.

    Args:
        source: Folder of a LoRA-Over checkpoint, or of a PEFT adapter of any kind.
        cache: Folder of the cache, which is made if it is missing.
        model: Folder or hub name of the base model as the engine serves it; for ONNX Runtime, the folder of an earlier
            swappable export, which holds the graph.
        engine: Engine to prepare for: vllm, llamacpp, onnx, openvino, mlx or torch.
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
    source, cache = Path(source).absolute(), Path(cache).absolute()
    target = Target(engine, str(model), dtype, engine_version)
    ranks = _checked(target, max_lora_rank, approximate_to_rank)
    base = _resolve(source, target)
    states = file_states(source)
    read = [*engine_of(engine).files(target.model), source / REFERENCE_FILE, source / TEMPLATE_FILE]
    digest = digest_of(source, base, asdict(target) | asdict(ranks), read)
    folder, refused = cache / digest, cache / f"{digest}.refused.json"
    found = _look_up(folder, refused, source)
    if found is not None:
        return found.opened(folder, perf_counter() - started, cached=True)
    with _locked(cache, digest):
        found = _look_up(folder, refused, source)  # another process made it meanwhile
        with _remembered(source, states, refused):
            record = found or _publish(source, base, target, ranks, digest, folder, states, started)
    return record.opened(folder, perf_counter() - started, cached=found is not None)


@contextmanager
def _remembered(source: Path, states: dict[str, tuple[int, ...]], refused: Path) -> Iterator[None]:
    """Remember what a block raises about an adapter, unless the adapter's files have changed since."""
    try:
        yield
    except LoraOverError as error:
        if file_states(source) == states and record_source(source).sha256.keys() == states.keys():
            with suppress(OutputError):  # a full disk must not hide what is wrong with the adapter
                remember(error, source, refused)
        raise


def _checked(target: Target, max_lora_rank: int | None, approximate_to_rank: int | None) -> RankLimits:
    faults = []
    if target.engine not in ENGINES:
        faults.append(f"engine is {target.engine!r}, expected one of {', '.join(ENGINES)}.")
    if target.dtype not in DTYPES:
        faults.append(f"dtype is {target.dtype!r}, expected one of {', '.join(DTYPES)}.")
    for name, rank in (("max_lora_rank", max_lora_rank), ("approximate_to_rank", approximate_to_rank)):
        if rank is not None and rank < 1:
            faults.append(f"{name} is {rank}, expected 1 or more.")
    if faults:
        raise ConfigError(" ".join(faults))
    largest = engine_of(target.engine).largest_rank if max_lora_rank is None else max_lora_rank
    if approximate_to_rank is not None and largest is not None and approximate_to_rank > largest:
        raise ConfigError(f"approximate_to_rank is {approximate_to_rank}, but the engine takes rank {largest} at most.")
    return RankLimits(largest, approximate_to_rank)


def _resolve(source: Path, target: Target) -> ModelSource:
    """Return the base model, at the revision that the adapter names if it names this model."""
    trained, name = named_base(source), engine_of(target.engine).base(target.model)
    revision = trained.revision if trained.base_model_name_or_path == name else None
    return resolve_model(name, *([] if revision is None else [revision]))


def _look_up(folder: Path, refused: Path, source: Path) -> Record | None:
    """Return the record of a prepared adapter, or raise its refusal; None if there is neither, or a damaged one."""
    record, refusal = _read(folder / RECORD_FILE, Record), _read(refused, Refusal)
    if record is not None and (folder / record.adapter).exists():
        return record
    if refusal is not None:
        raise refusal.raised(source)
    return None


def _read(path: Path, contents: type[Contents]) -> Contents | None:
    """Return what a file of the cache holds; None if it is missing or damaged, so that it is made again."""
    try:
        return read_json(path, contents)
    except CheckpointError:
        return None


@contextmanager
def _locked(cache: Path, digest: str) -> Iterator[None]:
    """Hold the lock of a key for a block, after any other process that makes the same adapter."""
    with ExitStack() as held:
        try:
            (cache / LOCKS).mkdir(parents=True, exist_ok=True)
            held.enter_context(hold_lock(cache / LOCKS / digest, wait=True))
        except OSError as error:
            raise OutputError(
                f"cache {cache}: cannot be written: {error.strerror or error}; choose another folder or free space."
            ) from error
        yield


def _publish(
    source: Path,
    base: ModelSource,
    target: Target,
    ranks: RankLimits,
    digest: str,
    folder: Path,
    states: dict[str, tuple[int, ...]],
    started: float,
) -> Record:
    with publish_directory(folder, outside=source, replace=folder.exists()) as draft:  # a damaged one, under its lock
        try:
            plain, conversion = _as_lora(source, base, target, ranks, draft)
            written = engine_of(target.engine).write(plain, draft, target)
            _check_matrices(plain, written.matrices)
        except LoraOverError as error:
            raise refusal_of(error, source, draft) from error.__cause__
        record = _record(source, digest, target, written, conversion, perf_counter() - started)
        for left in ("folded", "converted"):
            shutil.rmtree(draft / left, ignore_errors=True)
        (draft / ADAPTER / "README.md").unlink(missing_ok=True)  # its command line names the draft
        (draft / RECORD_FILE).write_text(record.model_dump_json(indent=1) + "\n")
        if file_states(source) != states:
            raise CheckpointError(f"{source}: its files changed while they were read; prepare it again.")
    return record


def _check_matrices(source: Path, matrices: list[MatrixCertificate]) -> None:
    """Refuse what was written of an adapter where a matrix is outside its bound."""
    wrong = [matrix.name for matrix in matrices if not matrix.passed]
    if wrong:
        raise FoldError(
            f"{source}: {len(wrong)} of {len(matrices)} written matrices are outside their bounds, the first of them "
            f"{wrong[0]}; choose a wider data type, such as fp32."
        )


def _as_lora(
    source: Path, base: ModelSource, target: Target, ranks: RankLimits, draft: Path
) -> tuple[Path, LoraCertificate | None]:
    """Return the folder of an adapter that the export takes, and the certificate of a conversion if there was one."""
    reason = why_convert(source, read_facts(base).shapes())
    if reason is not None:
        return _converted(source, target, ranks, draft, reason)
    rank = read_source(source).rank
    if ranks.largest is None or rank <= ranks.largest:
        return source, None
    from loraover.adapters.combine.shrink import shrink_adapter

    shrunk = draft / "converted"
    certificate = shrink_adapter(source, shrunk, rank=_approximation(source, rank, target, ranks), dtype=target.dtype)
    return shrunk, _kept(certificate, shrunk, draft)


def _converted(
    source: Path, target: Target, ranks: RankLimits, draft: Path, reason: str
) -> tuple[Path, LoraCertificate | None]:
    from loraover.adapters.convert.approximate import FullRankError
    from loraover.adapters.convert.run import convert_adapter

    plain, output = source, draft / "converted"
    if (source / META_FILE).is_file():
        from loraover_export.fold.run import fold_checkpoint

        plain = draft / "folded"
        fold_checkpoint(source, plain)
    convert = partial(
        convert_adapter, plain, output, model=engine_of(target.engine).base(target.model), dtype=target.dtype
    )
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
        allowed = _approximation(source, rank, target, ranks)
        report = convert(approximate_to_rank=allowed, force=True)
    return output, _kept(report.certificate, output, draft)


def _approximation(source: Path, rank: int, target: Target, ranks: RankLimits) -> int:
    """Return the rank to approximate an adapter of a larger one to.

    Raises:
        ExportError: No approximation is allowed.
    """
    if ranks.approximate is None:
        fitting, option = max_lora_rank(rank), engine_of(target.engine).rank_option
        larger = "" if fitting is None or option is None else f"start it with {option} {fitting}, or "
        raise ExportError(
            f"{source}: its rank is {rank}, and the engine takes {ranks.largest} at most; {larger}allow an "
            f"approximation with {as_written('approximate_to_rank')}."
        )
    return ranks.approximate


def _kept(certificate: LoraCertificate, folder: Path, draft: Path) -> LoraCertificate:
    """Keep the certificate of an intermediate result, which is removed."""
    if not certificate.passed:
        raise ExportError(f"{folder}: the certificate of its conversion failed; choose a wider dtype, such as fp32.")
    (folder / CERTIFICATE_FILE).rename(draft / CONVERSION_FILE)
    return certificate


def _record(
    source: Path, digest: str, target: Target, written: Written, conversion: LoraCertificate | None, seconds: float
) -> Record:
    done: Done = "taken" if written.taken else "rewritten"
    error = max(matrix.relative_error for matrix in written.matrices)
    if conversion is not None:
        is_exact = all(module.truncation_error == 0 for module in conversion.modules)
        done = "converted" if is_exact else "approximated"
        error = max(module.relative_error_bound for module in conversion.modules)
    return Record(
        digest=digest,
        engine=target.engine,
        adapter=written.name,
        rank=written.rank,
        done=done,
        notes=(*(() if conversion is None else conversion.notes), *_reference_notes(source, done)),
        certificate=written.certificate if conversion is None else CONVERSION_FILE,
        error=error,
        seconds=seconds,
    )


def _reference_notes(source: Path, done: Done) -> Iterator[str]:
    """Yield why the adapter's reference was left out, if it was."""
    reference = source / REFERENCE_FILE
    if not reference.is_file():
        return
    reason = "it is that of the exact adapter" if done == "approximated" else misfit(reference)
    if reason is not None:
        yield f"the reference was left out: {reason}"
