"""The export of an adapter for mlx-lm: read, refuse, write, certify, publish."""

from __future__ import annotations

from pathlib import Path

from loraover.adapters.numerics.matrix_certificate import matrix_facts
from loraover.adapters.uniform.served import ServedModel
from loraover.checkpoint.base_model import base_facts, resolve_base
from loraover.checkpoint.carried_reference import keep_reference
from loraover.checkpoint.chat_template import keep_chat_template
from loraover.checkpoint.files import CONFIG_FILE
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.checkpoint.source import read_source
from loraover.common.atomic_output import check_replaceable, publish_directory
from loraover.common.provenance import environment, hardware
from loraover.models.licence import known_licence
from loraover.reporting.model_card import model_card
from loraover.sources.verb import verb
from loraover_export.mlx.report import CERTIFICATE_FILE, MlxReport
from loraover_export.mlx.request import MlxRequest
from loraover_export.mlx.target import lost_settings, read_target, refuse_or_leave_out
from loraover_export.mlx.write import TENSORS_FILE, write_adapter


@verb(MlxRequest)
def export_mlx(request: MlxRequest) -> MlxReport:
    """Write an adapter as a folder that mlx-lm loads, with each module's scaling in B.

    Returns:
        The certificate of what was written. If its verdict is "failed", nothing was written.

    Raises:
        ConfigError: A base model that cannot be loaded.
        CheckpointError: An adapter that cannot be trusted, or that belongs to another base model.
        ExportError: An adapter that mlx-lm cannot apply.
        FoldError: An element beyond the range of `dtype`.
        OutputError: An output that cannot be written, or that exists and may not be replaced.
    """
    check_replaceable(
        request.output, "mlx-lm adapter", CERTIFICATE_FILE, inputs=[request.source], replace=request.force
    )
    adapter = read_source(request.source)
    base = resolve_base([adapter], request.model, option=request.named("model"), say=request.report.line)
    target = read_target(base)
    left_out = refuse_or_leave_out(adapter, target)
    with publish_directory(request.output, outside=request.source, replace=request.force) as draft:
        report = _write(request, adapter, target, draft, left_out)
        keep_chat_template(request.source, draft)
        report = report.keep(draft / CERTIFICATE_FILE)
        (draft / "README.md").write_text(_card(request, target, report), encoding="utf-8")
        keep_reference(request.source, draft, request.report.line, (CONFIG_FILE, TENSORS_FILE))
    return report


def _write(
    request: MlxRequest,
    adapter: AdapterDir,
    target: ServedModel,
    draft: Path,
    left_out: list[str],
) -> MlxReport:
    with request.report.task("writing matrices", len(adapter.matrices)) as done:
        matrices = write_adapter(adapter, target, draft, request.dtype, done)
    return MlxReport(
        verdict="passed" if all(matrix.passed for matrix in matrices) else "failed",
        base_model=target.source.name,
        architecture=target.architecture,
        dtype=request.dtype,
        rank=adapter.rank,
        scaling={path: module.scaling for path, module in adapter.modules.items()},
        left_out=left_out,
        lost_settings=lost_settings(target.source),
        matrices=matrices,
        versions=environment(),
        hardware=hardware(),
    )


def _card(request: MlxRequest, target: ServedModel, report: MlxReport) -> str:
    source = target.source
    facts = {
        "rank": str(report.rank),
        "stored as": report.dtype,
        **matrix_facts(report.matrices),
        **base_facts(source.name, source),
    }
    licence = known_licence(source.name, source.revision)
    return model_card("LoRA adapter for mlx-lm", source.name, facts, request.command(), licence=licence)
