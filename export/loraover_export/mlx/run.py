"""The export of an adapter for mlx-lm: read, refuse, write, certify, publish."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from loraover.checkpoint.base_model import base_facts, resolve_base
from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.exact_tensors import adapter_of, read_source
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.common.atomic_output import AbandonedError, check_replaceable, publish_directory
from loraover.common.dtypes import short_dtype
from loraover.common.provenance import environment, hardware
from loraover.common.reporter import SILENT, Reporter
from loraover.models.licence import known_licence
from loraover.reporting.model_card import model_card
from loraover_export.mlx.report import CERTIFICATE_FILE, MlxReport
from loraover_export.mlx.target import Target, lost_settings, read_target, refuse_or_leave_out
from loraover_export.mlx.write import write_adapter
from loraover_export.numerics.matrix_certificate import matrix_facts
from loraover_export.uniform.matrices import largest_rank, module_of


@dataclass(frozen=True)
class MlxRequest:
    """Arguments of `export_mlx`, where each is described."""

    source: Path
    output: Path
    model: str | None = None
    dtype: str = "fp32"
    force: bool = False

    def command(self) -> str:
        """Return the command line for the model card, without --force, which depends on what was at the output."""
        words = ["loraover", "export", "mlx", str(self.source), "-o", str(self.output), "--dtype", self.dtype]
        return shlex.join([*words, *([] if self.model is None else ["--model", self.model])])


def export_mlx(
    source: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    dtype: str = "fp32",
    force: bool = False,
    report: Reporter = SILENT,
) -> MlxReport:
    """Write an adapter as a folder that mlx-lm loads, with each module's scaling in B.

    Args:
        source: folder of a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA.
        output: new folder for the adapter, its certificate and a model card.
        model: base model, folder or hub name; None means the one that the adapter names.
        dtype: data type to store the adapter in: "fp32", "bf16", "fp16", or PyTorch's names of them.
        force: replace an adapter for mlx-lm that is already at `output`.
        report: receiver of progress.

    Returns:
        The certificate of what was written. If its verdict is "failed", nothing was written.

    Raises:
        ConfigError: a base model that cannot be loaded.
        CheckpointError: an adapter that cannot be trusted, or that belongs to another base model.
        ExportError: an adapter that mlx-lm cannot apply.
        FoldError: an element beyond the range of `dtype`.
        OutputError: an output that cannot be written, or that exists and may not be replaced.
    """
    request = MlxRequest(Path(source), Path(output), None if model is None else str(model), short_dtype(dtype), force)
    check_replaceable(
        request.output, "adapter for mlx-lm", CERTIFICATE_FILE, inputs=[request.source], replace=request.force
    )
    adapter = read_source(request.source)
    base = resolve_base([adapter_of(adapter)], request.model, option="--model", say=report.line)
    target = read_target(base)
    left_out = refuse_or_leave_out(adapter_of(adapter), target)
    made: list[MlxReport] = []
    with publish_directory(request.output, outside=request.source, replace=request.force) as draft:
        made.append(_write(request, adapter, target, draft, left_out, report))
        if not made[0].passed:
            raise AbandonedError
        (draft / CERTIFICATE_FILE).write_text(made[0].model_dump_json(indent=1) + "\n")
        (draft / "README.md").write_text(_card(request, target, made[0]), encoding="utf-8")
    return made[0]


def _write(
    request: MlxRequest,
    source: Checkpoint | AdapterDir,
    target: Target,
    draft: Path,
    left_out: list[str],
    report: Reporter,
) -> MlxReport:
    adapter = adapter_of(source)
    with report.task("writing matrices", len(adapter.sites)) as done:
        matrices = write_adapter(source, target, draft, request.dtype, done)
    return MlxReport(
        verdict="passed" if all(matrix.passed for matrix in matrices) else "failed",
        base_model=target.source.name,
        architecture=target.architecture,
        dtype=request.dtype,
        rank=largest_rank(adapter),
        scaling={path: adapter.config.scaling(path) for path in dict.fromkeys(map(module_of, adapter.sites))},
        left_out=left_out,
        lost_settings=lost_settings(target.source),
        matrices=matrices,
        versions=environment(),
        hardware=hardware(),
    )


def _card(request: MlxRequest, target: Target, report: MlxReport) -> str:
    source = target.source
    facts = {
        "rank": str(report.rank),
        "stored as": report.dtype,
        **matrix_facts(report.matrices),
        **base_facts(source.name, source),
    }
    licence = known_licence(source.name, source.revision)
    return model_card("LoRA adapter for mlx-lm", source.name, facts, request.command(), licence=licence)
