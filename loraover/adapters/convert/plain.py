"""An adapter of another kind as an exact plain LoRA, for exports that take nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from loraover.adapters.convert.kind import read_method, why_convert
from loraover.adapters.convert.source import read_peft_type
from loraover.adapters.uniform.certificate import LoraCertificate
from loraover.checkpoint.base_model import resolve_base
from loraover.checkpoint.files import META_FILE
from loraover.checkpoint.model_facts import read_facts
from loraover.common.errors import CheckpointError, ExportError, LoraOverError
from loraover.common.reporter import Reporter
from loraover.common.request import as_written


@dataclass(frozen=True)
class PlainLora:
    """A plain LoRA that an export reads.

    Args:
        path: Its folder; the adapter's own if nothing was converted.
        certificate: Certificate of the conversion; None if nothing was converted.
    """

    path: Path
    certificate: LoraCertificate | None


@contextmanager
def plain_lora(source: Path, *, model: str | None, dtype: str, report: Reporter) -> Iterator[PlainLora]:
    """Convert an adapter of another kind into an exact plain LoRA, which exists for the length of a block.

    What is a LoRA already, or damaged, is left as it is, for the export to take or to refuse.

    Args:
        source: Folder of a LoRA-Over checkpoint, or of an adapter of any kind.
        model: Base model; None means the one that the adapter names.
        dtype: Data type to store A and B in: fp32, bf16 or fp16.

    Raises:
        ConfigError: A base model that cannot be read.
        CheckpointError: An adapter of a kind that is not known.
        ExportError: An adapter that no plain LoRA, or none of a small rank, expresses exactly.
        FoldError: An element beyond the range of `dtype`.
    """
    reason = _reason(source, model)
    if reason is None:
        yield PlainLora(source, None)
        return
    from loraover.adapters.convert.run import FullRankError, convert_adapter

    report.line(f"{reason}: converting it into an exact plain LoRA")
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / source.resolve().name
        try:
            certificate = convert_adapter(source, folder, model=model, dtype=dtype).certificate
        except FullRankError as error:
            raise _no_exact(source, reason) from error
        if not certificate.passed:
            raise ExportError(f"{source}: its conversion lost too much; choose a wider dtype, such as fp32.")
        yield PlainLora(folder, certificate)


def _reason(source: Path, model: str | None) -> str | None:
    """Return the reason for which an adapter is to be converted; None for a LoRA that the export itself can handle."""
    shapes: Mapping[str, tuple[int, int]] = {}  # by which another prefix shows; not needed for a checkpoint's cores
    try:
        if not (source / META_FILE).exists():
            with suppress(LoraOverError):  # the export says what is wrong with an adapter or a base model
                base = resolve_base([read_method(source)[1]], model, option=as_written("model"), say=lambda line: None)
                shapes = read_facts(base).shapes()
        reason = why_convert(source, shapes)
    except (CheckpointError, ExportError):  # the same, with more detail
        return None
    if reason is None:
        return None
    is_lora = read_peft_type(source) == "LORA"
    try:
        method, layout = read_method(source)
    except LoraOverError:
        if is_lora:
            return None
        raise
    if method.is_exact(layout.config):
        return reason
    if is_lora:
        return None
    raise _no_exact(source, reason)


def _no_exact(source: Path, reason: str) -> ExportError:
    return ExportError(
        f"{source}: {reason}, which no plain LoRA of a small rank expresses exactly; write an approximation with "
        "`loraover export convert` and --approximate-to-rank, which states the error."
    )
