"""PyTorch with PEFT, which wrote the form: only another base model or renamed tensors make it wrong.

Reactions were measured on a tiny Llama with PEFT 0.21.2. PEFT renames modules of transformers before 5 as transformers
does when it loads old weights, and puts the matrices of single experts together: gate and up become one pair of twice
the rank and twice the alpha, which is right unless alpha is divided by the root of the rank. Source:
peft/utils/transformers_weight_conversion.py of PEFT 0.21.2; measured on tiny Mixtral and Qwen3-MoE.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from loraover.common.later import has_torch
from loraover_export.check.engines.base import CORES, NOT_NUMBERS, command, note, react, refused, silent
from loraover_export.check.engines.vllm import UniformRules, uniform_form
from loraover_export.check.features import initialisation, quantised_base
from loraover_export.check.report import EngineFinding, Level
from loraover_export.check.subject import Subject
from loraover_export.formats.vllm.candidate import listed

PEFT_FORM = {
    "method": note("PEFT has this method"),
    "DoRA": note("PEFT has the magnitudes"),
    "lost initialisation": silent(
        "PEFT computes other first factors when it loads the adapter, and pairs A and B with other weights"
    ),
    "other initialisation": refused("PEFT cannot repeat this initialisation from the base model alone"),
    "megatron": refused("PEFT must import Megatron for this, and fails if it is not installed"),
    "rank": refused("PEFT cannot load matrices of another rank"),
    "key prefix": silent("PEFT ignores such keys and answers as the base model, with a Python warning only"),
    "doubled prefix": silent("PEFT ignores such keys and answers as the base model, with a Python warning only"),
    "missing modules": silent("PEFT ignores their matrices, with a Python warning at most"),
    "absent layers": note(
        "PEFT ignores their matrices with a Python warning, which is right for a base model without these layers"
    ),
    "no targets": refused("PEFT loads no adapter without a module to adapt"),
    "lost matrices": silent("PEFT initialises the missing matrix anew, with only a Python warning"),
    "unnamed modules": silent("PEFT ignores these matrices, with a Python warning at most"),
    "numbers": NOT_NUMBERS,
    "lost modules": silent("PEFT initialises these modules anew, so they have no effect, with only a Python warning"),
    "lost parameters": refused("PEFT cannot load it"),
    "other shapes": refused("PEFT cannot load matrices of other shapes"),
    "cores": CORES,
}


FUSED = ("mixtral", "qwen2_moe")
"""Patterns of transformers whose experts PEFT puts together."""


@final
class TorchRules(UniformRules):
    """PEFT, as a script with transformers uses it."""

    reader = "PEFT 0.21.2"

    def as_it_is(self, subject: Subject) -> Iterator[EngineFinding]:
        older = older_names(subject)
        if older is None:
            yield from react(subject, PEFT_FORM)
        else:
            yield older
            renamed = ("missing modules", "no targets", "unnamed modules", "files")
            yield from (found for found in react(subject, PEFT_FORM) if found.feature not in renamed)
        flipped = [] if subject.lora is None else [stack for stack in subject.lora.stacks if stack.is_flipped]
        if flipped:
            fits = all(m == n for m, n in (subject.served.experts[stack.path].shape for stack in flipped))
            text = f"PEFT before 0.19 saved {flipped[0].path} with A and B swapped; this release "
            text += "applies the transposed matrices" if fits else "cannot load them"
            yield EngineFinding(feature="experts", level="wrong silently" if fits else "refused", found=text)
        start = initialisation(subject)
        if start is not None and quantised_base(subject) is not None:
            text = f"{start}; PEFT cannot compute this initialisation from quantised weights"
            yield EngineFinding(feature="initialisation", level="refused", found=text)

    def exported(self, subject: Subject) -> Iterator[EngineFinding]:
        for found in () if subject.has_cores else uniform_form(subject):  # the fold keeps all that PEFT reads
            if found.feature != "experts" or not joins_experts(subject):
                yield found

    def export(self, subject: Subject) -> str:
        if subject.has_cores:
            return command(subject, "fold", ending="-folded")
        return command(subject, "vllm", ending="-uniform")


@dataclass(frozen=True)
class _Expert:
    """A projection of one expert: the parameter that holds it now, its number, and its names beside those it joins."""

    parameter: str
    number: int
    name: str
    joined: tuple[str, ...]


def older_names(subject: Subject) -> EngineFinding | None:
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
        new = f"{path}.weight"
        for entry in (entry for entry in entries if not hasattr(entry, "operations")):
            for source, target in zip(entry.source_patterns, entry.target_patterns, strict=True):
                new = re.sub(source, target, new)
        # A language model below another model is one without its head, which used to be a part of it.
        new = new.removesuffix(".weight").replace(".language_model.model.", ".language_model.")
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
    return EngineFinding(feature="older names", level=level, found=f"{first}: names of transformers before 5; {text}")


def joins_experts(subject: Subject) -> bool:
    """Whether PEFT puts the matrices of single experts together when it loads an adapter, and does so rightly."""
    # Beside a shared expert, whose projections have the same names, it does so wrongly: on a tiny Qwen2-MoE, logits
    # were off by 0.67 where the adapter changes them by 0.84.
    if not has_torch() or any(".shared_expert." in path for path in subject.served.modules):
        return False
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN
    except ImportError:  # before transformers 5
        return False
    kind = subject.served.model_type
    return kind in FUSED or _MODEL_TO_CONVERSION_PATTERN.get(kind) in FUSED


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
