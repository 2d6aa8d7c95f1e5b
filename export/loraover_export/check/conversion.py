"""An adapter after its exact conversion, foretold from its configuration and keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraover.adapters.uniform.served import ServedModel
from loraover.checkpoint.adapter_config import AdapterConfig
from loraover.checkpoint.peft_adapter import BASE_WEIGHT, KEY_PREFIX, AdapterDir, site_key
from loraover.common.errors import LoraOverError
from loraover_export.check.engines.base import command
from loraover_export.check.features import FEATURES, lost_parameters
from loraover_export.check.report import Finding
from loraover_export.check.subject import Subject

if TYPE_CHECKING:
    from loraover.adapters.convert.prefix import Move
    from loraover.adapters.convert.source import MethodConfig

CONVERTED = ("initialisation", "trained tokens", "missing modules", "key prefix", "doubled prefix")
"""Features of a plain LoRA that a conversion may mend; the methods of conversion take seconds to import."""

ENDING = "-lora"
"""Ending of the name of a conversion's folder, after that of the adapter's."""


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
    note: Finding


def converted_subject(subject: Subject) -> Conversion | None:
    """Return what the exact conversion of an adapter will be; None if it needs none or has none."""
    if subject.not_finite is not None:
        return None
    if subject.lora is not None and not any(FEATURES[name](subject) for name in CONVERTED):
        return None
    from loraover.adapters.convert.kind import read_method
    from loraover.adapters.convert.need import why_convert
    from loraover.adapters.convert.others import is_served_head, saved_module
    from loraover.adapters.convert.prefix import find_move

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
    kept = {key: subject.shapes[key] for key in others if key in subject.shapes}
    plain = replace(_plain_lora(subject, layout.config, names.values(), kept), served=_part_of(subject.served, move))
    text = f"{reason}, which `loraover export convert` writes as an exact plain LoRA of rank {method.rank}"
    note = Finding(feature="conversion", level="note", found=text)
    return Conversion(plain, command(subject, "convert", ending=ENDING), note)


def _plain_lora(
    subject: Subject, trained: MethodConfig, paths: Iterable[str], kept: Mapping[str, tuple[int, ...]]
) -> Subject:
    """Return a subject that is a plain LoRA of rank 1 on some modules.

    Args:
        subject: The adapter that is converted.
        trained: Its configuration.
        paths: Adapted modules of the served model.
        kept: Shapes of the tensors beside A and B, by key.
    """
    keys, shapes = dict(kept), subject.served.shapes()
    for path in paths:
        (m, n), kind = shapes[path], ""
        if subject.served.modules[path].kind == "embedding":
            m, n, kind = n, m, "embedding_"
        keys |= {site_key(f"{path}.lora_{kind}A"): (1, n), site_key(f"{path}.lora_{kind}B"): (m, 1)}
    config = AdapterConfig(
        peft_type="LORA",
        task_type=trained.task_type,
        base_model_name_or_path=trained.base_model_name_or_path,
        revision=trained.revision,
        r=1,
        lora_alpha=1,
    )
    return replace(
        subject,
        written=Path(f"{subject.path.resolve()}{ENDING}"),
        config=config.model_dump(),
        fields=config,
        shapes=keys,
        lora=AdapterDir(subject.path, config, keys),
        unreadable=None,
        has_cores=False,
    )


def _part_of(served: ServedModel, move: Move | None) -> ServedModel:
    """Return the part of a model that an adapter was trained as, whose other parts its configuration may name too."""
    if move is None:
        return served
    from loraover.adapters.convert.prefix import part_below

    return replace(served, modules={path: served.modules[path] for path in part_below(move.new, served.modules)})
