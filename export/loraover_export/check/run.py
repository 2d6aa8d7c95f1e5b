"""The check of an adapter: read it, and let each engine judge both forms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loraover.common.reporter import SILENT, Reporter
from loraover_export.check.engines import engine_of
from loraover_export.check.report import CheckReport, EngineCheck, judge
from loraover_export.check.request import CheckRequest
from loraover_export.check.subject import Subject, read_subject


def check_adapter(
    adapter: str | Path,
    *,
    engines: str | Sequence[str] = (),
    model: str | Path | None = None,
    report: Reporter = SILENT,
) -> CheckReport:
    """Say for each engine whether it would refuse an adapter, or apply it wrongly without a message; nothing is run.

    The answer rests on each engine's sources and on runs of small models, on the adapter's configuration and tensor
    names, and on the base model's configuration. `loraover_serve.verify_adapter` runs an engine instead.

    Args:
        adapter: folder of a LoRA-Over checkpoint, or of a PEFT adapter of any method.
        engines: engines to judge for: "vllm", "llamacpp", "onnx", "openvino", "mlx" or "torch"; empty means all.
        model: base model, folder or hub name; None means the one that the adapter names.
        report: receiver of lines about the base model.

    Returns:
        For each engine, a verdict on the adapter as it is, a verdict on what the export writes, and the export's
        command.

    Raises:
        ConfigError: an engine that is not known, or a base model that cannot be read.
        CheckpointError: no adapter, or files that cannot be trusted.
    """
    names = (engines,) if isinstance(engines, str) else tuple(engines)
    request = CheckRequest(Path(adapter), names, None if model is None else str(model))
    subject = read_subject(request.adapter, request.model)
    if subject.served.source.stand_in is not None:
        report.line(f"base model: {subject.served.source.origin}; only its names and shapes are compared")
    checks = [_check(name, subject) for name in request.chosen]
    return CheckReport(
        verdict="passed" if all(check.as_it_is.verdict == "right" for check in checks) else "failed",
        adapter=str(request.adapter),
        peft_type=subject.config["peft_type"],
        base_model=subject.served.source.name,
        architecture=subject.served.architecture,
        modules=len(subject.modules),
        ranks=tuple(subject.ranks),
        engines=tuple(checks),
    )


def _check(name: str, subject: Subject) -> EngineCheck:
    engine = engine_of(name)
    return EngineCheck(
        engine=name,
        reader=engine.reader,
        as_it_is=judge(engine.as_it_is(subject)),
        exported=judge(engine.exported(subject)),
        export=engine.export(subject),
    )
