"""The check of an adapter: read it, and let each engine judge both forms."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from loraover.adapters.uniform.served import ServedModel, read_served
from loraover.checkpoint.adapter_config import AdapterConfig
from loraover.checkpoint.files import CONFIG_FILE, META_FILE, TENSORS_FILE
from loraover.checkpoint.peft_adapter import AdapterDir, read_on_base
from loraover.checkpoint.source import read_source
from loraover.checkpoint.target_modules import check_named, left_to_the_type
from loraover.checkpoint.tensor_file import open_tensors
from loraover.common.errors import CheckpointError, ConfigError
from loraover.common.paths import kind_of
from loraover.common.strict_json import read_json
from loraover.models.load import resolve_model
from loraover.sources.address import is_elsewhere
from loraover.sources.verb import verb
from loraover_export.check.conversion import Conversion, converted_subject
from loraover_export.check.engines import engine_of
from loraover_export.check.report import CheckReport, EngineCheck, Finding, judge
from loraover_export.check.request import CheckRequest
from loraover_export.check.subject import Subject


class _AnyConfig(BaseModel):
    """Fields that every PEFT method has; other fields are kept unread."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    modules_to_save: list[str] | str | None = None
    target_parameters: list[str] | str | None = None
    trainable_token_indices: dict[str, list[int]] | list[int] | None = None


@verb(CheckRequest)
def check_adapter(request: CheckRequest) -> CheckReport:
    """Say for each engine whether it would refuse an adapter, or apply it wrongly without a message; nothing is run.

    The answer rests on each engine's sources and on runs of small models, on the adapter's configuration, on its
    tensors' names, shapes and numbers that are not finite, and on the base model's configuration.
    `loraover_serve.verify_adapter` runs an engine instead.

    Returns:
        For each engine, a verdict on the adapter as it is, verdicts on what the export writes of it and of its
        conversion, and the commands that write it.

    Raises:
        ConfigError: An engine that is not known, or a base model that cannot be read.
        CheckpointError: No adapter, or files that cannot be trusted.
    """
    subject = _read(request)
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


def _read(request: CheckRequest) -> Subject:
    """Read an adapter's configuration and tensor layout, and the configuration of its base model.

    Raises:
        CheckpointError: No adapter, or files that cannot be read.
        ConfigError: No base model, or one that transformers cannot build.
    """
    path, model = request.adapter, request.model
    if kind_of(path) != "folder":
        raise CheckpointError(f"{path}: no such folder; expected a PEFT adapter directory.")
    config = read_json(path / CONFIG_FILE, _AnyConfig)
    with open_tensors(path / TENSORS_FILE) as file:
        shapes = {key: file.shape(key) for key in file.keys}
        strange = next((key for key in file.keys if not file.is_finite(key)), None)
    named = model or config.base_model_name_or_path
    if named is None:
        raise ConfigError(f"{path}: names no base model; name the base model with {request.named('model')}.")
    revision = config.revision if named == config.base_model_name_or_path else None
    if model is None and is_elsewhere(named):
        raise ConfigError(
            f"{path}: names the base model {named}, an address that is read only if you name it yourself; use "
            f"{request.named('model', named)} if you trust it."
        )
    source = resolve_model(named, revision, with_weights=False, say=request.report.line)
    served = read_served(source)
    lora, unreadable = _read_lora(path, has_cores := (path / META_FILE).exists(), served)
    return Subject(
        path=path,
        config=config.model_dump(),
        fields=read_json(path / CONFIG_FILE, AdapterConfig) if config.peft_type == "LORA" else None,
        shapes=shapes if lora is None or not lora.stacks else lora.shapes,
        lora=lora,
        unreadable=unreadable,
        not_finite=None if strange is None else f"{strange} holds NaN or infinity",
        has_cores=has_cores,
        served=served,
        model=model,
    )


def _read_lora(path: Path, has_cores: bool, served: ServedModel) -> tuple[AdapterDir | None, str | None]:
    """Read the adapter as the exports do; a checkpoint that contradicts itself is an error here as well."""
    try:
        lora = read_on_base(read_source(path), served.experts)
        if left_to_the_type(path / CONFIG_FILE):
            check_named(path / CONFIG_FILE, lora.modules.keys(), served.model_type)
        return lora, None
    except CheckpointError as error:
        if has_cores:
            raise
        return None, str(error)


def _unwritten(subject: Subject) -> Iterator[Finding]:
    """Yield what keeps every export from writing the adapter."""
    if subject.not_finite is not None:
        yield Finding(feature="numbers", level="refused", found=f"{subject.not_finite}; no export writes that")


def _check(name: str, subject: Subject, converted: Conversion | None) -> EngineCheck:
    engine = engine_of(name)
    as_it_is, exported = judge(engine.as_it_is(subject)), judge([*engine.exported(subject), *_unwritten(subject)])
    after = None if exported.verdict == "right" else converted
    return EngineCheck(
        engine=name,
        reader=engine.reader,
        as_it_is=as_it_is,
        exported=exported,
        converted=None if after is None else judge([after.note, *engine.exported(after.subject)]),
        conversion=None if after is None else after.command,
        export=engine.export(subject if after is None else after.subject),
    )
