"""The check of an adapter: read it, and let each engine judge both forms."""

from __future__ import annotations

from loraover.common.request import verb
from loraover_export.check.engines import engine_of
from loraover_export.check.report import CheckReport, EngineCheck, judge
from loraover_export.check.request import CheckRequest
from loraover_export.check.subject import Subject, read_subject


@verb(CheckRequest)
def check_adapter(request: CheckRequest) -> CheckReport:
    """Say for each engine whether it would refuse an adapter, or apply it wrongly without a message; nothing is run.

    The answer rests on each engine's sources and on runs of small models, on the adapter's configuration and tensor
    names, and on the base model's configuration. `loraover_serve.verify_adapter` runs an engine instead.

    Returns:
        For each engine, a verdict on the adapter as it is, a verdict on what the export writes, and the export's
        command.

    Raises:
        ConfigError: An engine that is not known, or a base model that cannot be read.
        CheckpointError: No adapter, or files that cannot be trusted.
    """
    subject = read_subject(request)
    if subject.served.source.stand_in is not None:
        request.report.line(f"base model: {subject.served.source.origin}; only its names and shapes are compared")
    checks = [_check(name, subject) for name in request.chosen]
    return CheckReport(
        verdict="passed" if all(check.as_it_is.verdict == "right" for check in checks) else "failed",
        adapter=request.shown("adapter"),
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
