"""Adapters whose modules have the names of transformers before 5, and what PEFT makes of them when it loads them.

PEFT renames modules as transformers does when it loads old weights, and puts the matrices of single experts together:
gate and up become one pair of twice the rank and twice the alpha, which is right unless alpha is divided by the root of
the rank. Source: peft/utils/transformers_weight_conversion.py of PEFT 0.21.2; measured on tiny Mixtral and Qwen3-MoE.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loraover.common.later import has_torch
from loraover_export.check.report import Finding, Level
from loraover_export.check.subject import Subject
from loraover_export.formats.vllm.candidate import listed

FUSED = ("mixtral", "qwen2_moe")
"""Patterns of transformers whose experts PEFT puts together."""


@dataclass(frozen=True)
class _Expert:
    """A projection of one expert: the parameter that holds it now, its number, and its names beside those it joins."""

    parameter: str
    number: int
    name: str
    joined: tuple[str, ...]


def older_names(subject: Subject) -> Finding | None:
    """Return what PEFT does with an adapter under older names; None if it has none, or belongs to another model."""
    if subject.fields is None or not has_torch() or subject.served.modules.keys() >= {*subject.modules}:
        return None  # without an import of transformers, which takes most of a check's time
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # before transformers 5
        return None
    entries = get_checkpoint_conversion_mapping(subject.served.model_type) or []
    has_fused = joins_experts(subject)
    experts: dict[str, _Expert] = {}
    renamed = 0
    for path in subject.modules:
        new = _renamed(path, entries)
        found = next(_experts(new, entries), None) if has_fused else None
        if found is not None and found.parameter in subject.served.experts:
            experts[path] = found
        elif new not in subject.served.modules:
            return None
        renamed += new != path
    if not experts and not renamed:
        return None
    level, text = _verdict(subject, experts)
    first = listed(list(experts) or subject.modules)
    return Finding(feature="older names", level=level, found=f"{first}: names of transformers before 5; {text}")


def joins_experts(subject: Subject) -> bool:
    """Whether PEFT puts the matrices of single experts together when it loads an adapter.

    Beside a shared expert, whose projections have the same names, it does so wrongly: on a tiny Qwen2-MoE, logits were
    off by 0.67 where the adapter changes them by 0.84.
    """
    if not has_torch() or any(".shared_expert." in path for path in subject.served.modules):
        return False
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN
    except ImportError:  # before transformers 5
        return False
    kind = subject.served.model_type
    return kind in FUSED or _MODEL_TO_CONVERSION_PATTERN.get(kind) in FUSED


def _renamed(path: str, entries: list[Any]) -> str:
    """Return a module's present path."""
    key = f"{path}.weight"
    for entry in entries:
        if not hasattr(entry, "operations"):
            for source, target in zip(entry.source_patterns, entry.target_patterns, strict=True):
                key = re.sub(source, target, key)
    # A language model below another model is one without its head, which used to be a part of it.
    return key.removesuffix(".weight").replace(".language_model.model.", ".language_model.")


def _experts(path: str, entries: list[Any]) -> Iterator[_Expert]:
    """Yield the projection of an expert that a path names."""
    for entry in entries:
        sources = entry.source_patterns if hasattr(entry, "operations") else []
        names = tuple(source.split(".")[-2] for source in sources)
        for source, name in zip(sources, names, strict=True):
            match = re.search(re.escape(source).replace(r"\*", r"(\d+)") + "$", f"{path}.weight")
            if match is not None:
                parameter = f"{path}.weight"[: match.start()] + entry.target_patterns[0]
                yield _Expert(parameter, int(match[1]), name, names)


def _verdict(subject: Subject, experts: dict[str, _Expert]) -> tuple[Level, str]:
    assert subject.fields is not None
    fields, found = subject.fields, set(experts.values())
    for expert in found:
        count = subject.served.experts[expert.parameter].experts
        every = {_Expert(expert.parameter, n, name, expert.joined) for n in range(count) for name in expert.joined}
        if not every <= found:
            return "refused", "PEFT loads them only if the file has every projection of every expert"
        down = f"{expert.parameter.rpartition('.')[0]}.down_proj"
        if all(other.parameter != down for other in found):
            return "wrong silently", f"PEFT ignores them without those of {down}"
    if any(fields.rank(path) != fields.r for path in experts):
        return "refused", "PEFT cannot put pairs of different ranks together"
    plain = fields.lora_alpha / fields.r
    if any(fields.scaling(path) != plain for path, expert in experts.items() if len(expert.joined) > 1):
        return "wrong silently", "PEFT puts gate and up together and scales them by lora_alpha and r alone"
    return "note", "PEFT renames them, and puts the matrices of single experts together"
