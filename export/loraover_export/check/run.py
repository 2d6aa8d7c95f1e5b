"""The check of an adapter: read it, and let each engine judge both forms."""

from __future__ import annotations

from loraover.common.verb import verb
from loraover_export.check.conversion import Conversion, converted_subject
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
        For each engine, a verdict on the adapter as it is, verdicts on what the export writes of it and of its
        conversion, and the commands that write it.

    Raises:
        ConfigError: An engine that is not known, or a base model that cannot be read.
        CheckpointError: No adapter, or files that cannot be trusted.
    """
    subject = read_subject(request)
    if subject.served.source.stand_in is not None:
        request.report.line(f"base model: {subject.served.source.origin}; only its names and shapes are compared")
    converted = converted_subject(subject)
    checks = [_check(name, subject, converted) for name in request.chosen]
    return CheckReport(
        verdict="passed" if (all if request.engines else any)(check.is_served for check in checks) else "failed",
        adapter=request.shown("adapter"),
        peft_type=subject.config["peft_type"],
        base_model=subject.served.source.name,
        architecture=subject.served.architecture,
        modules=len(subject.modules),
        ranks=tuple(subject.ranks),
        engines=tuple(checks),
    )


def _check(name: str, subject: Subject, converted: Conversion | None) -> EngineCheck:
    engine = engine_of(name)
    as_it_is, exported = judge(engine.as_it_is(subject)), judge(engine.exported(subject))
    after = None
    if converted is not None and exported.verdict != "right":
        after = judge([converted.note, *engine.exported(converted.subject)])
    return EngineCheck(
        engine=name,
        reader=engine.reader,
        as_it_is=as_it_is,
        exported=exported,
        converted=after,
        conversion=None if after is None or converted is None else converted.command,
        export=engine.export(subject if after is None or converted is None else converted.subject),
    )
