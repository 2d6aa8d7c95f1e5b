"""The check of an adapter: read it, foretell its exact conversion, and apply each engine's rules to both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from loraover.checkpoint.adapter_config import AdapterConfig
from loraover.checkpoint.files import CONFIG_FILE, META_FILE, TENSORS_FILE
from loraover.checkpoint.model_facts import read_served
from loraover.checkpoint.peft_adapter import BASE_WEIGHT, KEY_PREFIX, AdapterDir, read_on_base, site_key
from loraover.checkpoint.source import read_source
from loraover.checkpoint.target_modules import check_named, left_to_the_type
from loraover.checkpoint.tensor_file import open_tensors
from loraover.common.errors import CheckpointError, ConfigError, LoraOverError
from loraover.common.paths import kind_of
from loraover.common.strict_json import read_json
from loraover.models.load import resolve_model
from loraover.sources.address import is_elsewhere
from loraover.sources.verb import verb
from loraover_export.check.engines import engine_of
from loraover_export.check.engines.base import command
from loraover_export.check.features import FEATURES, lost_parameters
from loraover_export.check.report import CheckReport, EngineCheck, EngineFinding, treatment
from loraover_export.check.request import CheckRequest
from loraover_export.check.subject import Subject
from loraover_export.known_faults import faults_of

CONVERTED = ("initialisation", "trained tokens", "missing modules", "key prefix", "doubled prefix")
"""Features of a plain LoRA that a conversion may mend; other LoRAs need not import conversions, which takes seconds."""

ENDING = "-lora"
"""Ending of the name of a conversion's folder, after that of the adapter's."""


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
    unwritten, checks = [], []
    if subject.not_finite is not None:
        text = f"{subject.not_finite}; no export writes NaN or infinity"
        unwritten.append(EngineFinding(feature="numbers", level="refused", found=text))
    for name in request.chosen:
        engine = engine_of(name)
        exported = treatment([*engine.exported(subject), *unwritten])
        after = None if exported.verdict == "right" else converted
        checks.append(
            EngineCheck(
                engine=name,
                reader=engine.reader,
                as_it_is=treatment(engine.as_it_is(subject)),
                exported=exported,
                converted=None if after is None else treatment([after.note, *engine.exported(after.subject)]),
                conversion=None if after is None else after.command,
                export=engine.export(subject if after is None else after.subject),
                known_faults=tuple(fault.name for fault in faults_of(name, engine.version)),
            )
        )
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
    """Read an adapter's configuration and tensor layout, and the configuration of its base model."""
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
    has_cores = (path / META_FILE).exists()
    lora: AdapterDir | None = None
    unreadable = None
    try:
        lora = read_on_base(read_source(path), served.experts)
        if left_to_the_type(path / CONFIG_FILE):
            check_named(path / CONFIG_FILE, lora.modules.keys(), served.model_type)
    except CheckpointError as error:
        if has_cores:  # a checkpoint that contradicts itself is an error here as well as in the exports
            raise
        lora, unreadable = None, str(error)
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


@dataclass(frozen=True)
class Conversion:
    """A plain LoRA that does not exist yet.

    Args:
        subject: The LoRA, whose rank is not known before it is made and counts as 1.
        command: Command that makes it.
        note: What it is, as a finding.
    """

    subject: Subject
    command: str
    note: EngineFinding


def converted_subject(subject: Subject) -> Conversion | None:
    """Return what the exact conversion of an adapter will be; None if it needs none or has none."""
    if subject.not_finite is not None:
        return None
    if subject.lora is not None and not any(FEATURES[name](subject) for name in CONVERTED):
        return None
    from loraover.adapters.convert.kind import is_served_head, read_method, saved_module, why_convert
    from loraover.adapters.convert.prefix import find_move, part_below

    shapes = subject.served.shapes()
    try:
        reason = why_convert(subject.path, shapes)
        if reason is None:
            return None
        method, layout = read_method(subject.path)
        if not method.is_exact(layout.config):
            return None
        move = find_move(layout, shapes)
    except LoraOverError:  # whatever keeps the adapter from being converted, its exports say
        return None
    names = {path: path if move is None else move.paths.get(path, path) for path in layout.modules}
    if not names.keys() or any(name not in shapes for name in names.values()):
        return None
    others = [key for key in layout.others if not key.endswith(BASE_WEIGHT)]
    saved = [saved_module(key.removeprefix(KEY_PREFIX), layout.config) for key in others]
    is_kept = all(module is not None and is_served_head(module) for module in saved)
    if not is_kept or lost_parameters(subject) is not None:
        return None
    keys = {key: subject.shapes[key] for key in others if key in subject.shapes}
    for path in names.values():
        (m, n), kind = shapes[path], ""
        if subject.served.modules[path].kind == "embedding":
            m, n, kind = n, m, "embedding_"
        keys |= {site_key(f"{path}.lora_{kind}A"): (1, n), site_key(f"{path}.lora_{kind}B"): (m, 1)}
    config = AdapterConfig(
        peft_type="LORA",
        task_type=layout.config.task_type,
        base_model_name_or_path=layout.config.base_model_name_or_path,
        revision=layout.config.revision,
        r=1,
        lora_alpha=1,
    )
    served = subject.served
    if move is not None:  # the configuration may also name modules of parts that the adapter was not trained as
        served = replace(served, modules={path: served.modules[path] for path in part_below(move.new, served.modules)})
    plain = replace(
        subject,
        written=Path(f"{subject.path.resolve()}{ENDING}"),
        config=config.model_dump(),
        fields=config,
        shapes=keys,
        lora=AdapterDir(subject.path, config, keys),
        unreadable=None,
        has_cores=False,
        served=served,
    )
    text = f"{reason}, which `loraover export convert` writes as an exact plain LoRA of rank {method.rank}"
    note = EngineFinding(feature="conversion", level="note", found=text)
    return Conversion(plain, command(subject, "convert", ending=ENDING), note)
