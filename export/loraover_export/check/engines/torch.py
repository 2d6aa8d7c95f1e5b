"""PyTorch with PEFT, which wrote the form, so that only other base models and renamed tensors are wrong.

Reactions were measured on a tiny Llama with PEFT 0.21.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from loraover_export.check.engines.base import CORES, NOT_NUMBERS, command, note, react, refused, silent
from loraover_export.check.engines.vllm import UniformRules, uniform_form
from loraover_export.check.features import initialisation, quantised_base
from loraover_export.check.older_names import joins_experts, older_names
from loraover_export.check.report import Finding
from loraover_export.check.subject import Subject

PEFT_FORM = {
    "method": note("PEFT has this method"),
    "DoRA": note("PEFT has the magnitudes"),
    "lost initialisation": silent("PEFT starts it otherwise when it loads it, and pairs A and B with other weights"),
    "other initialisation": refused("PEFT cannot start it again from the base model alone"),
    "megatron": refused("PEFT has to import Megatron then, and cannot without it"),
    "rank": refused("PEFT cannot load matrices of another rank"),
    "key prefix": silent("PEFT ignores such keys and answers as the base model, with a Python warning only"),
    "doubled prefix": silent("PEFT ignores such keys and answers as the base model, with a Python warning only"),
    "missing modules": silent("PEFT ignores their matrices, with a Python warning at most"),
    "absent layers": note(
        "PEFT ignores their matrices with a Python warning, as a base model without these layers needs it"
    ),
    "no targets": refused("PEFT loads no adapter without a module to adapt"),
    "lost matrices": silent("PEFT starts the other matrix again, with a Python warning only"),
    "unnamed modules": silent("PEFT ignores these matrices, with a Python warning at most"),
    "numbers": NOT_NUMBERS,
    "lost modules": silent("PEFT starts these modules again, so they do nothing, with a Python warning only"),
    "lost parameters": refused("PEFT cannot load it"),
    "other shapes": refused("PEFT cannot load matrices of other shapes"),
    "cores": CORES,
}


def _swapped(subject: Subject) -> Iterator[Finding]:
    """Yield what PEFT does with experts whose A and B a PEFT before 0.19 saved the other way round."""
    flipped = [] if subject.lora is None else [stack for stack in subject.lora.stacks if stack.is_flipped]
    if flipped:
        shapes = {subject.served.experts[stack.path].shape for stack in flipped}
        fits = all(m == n for m, n in shapes)
        found = f"PEFT before 0.19 saved {flipped[0].path} with A and B swapped; " + (
            "this release applies the transposed matrices" if fits else "this release cannot load them"
        )
        yield Finding(feature="experts", level="wrong silently" if fits else "refused", found=found)


@final
class TorchRules(UniformRules):
    """PEFT, as a script with transformers uses it."""

    reader = "PEFT 0.21.2"

    def as_it_is(self, subject: Subject) -> Iterator[Finding]:
        older = older_names(subject)
        if older is None:
            yield from react(subject, PEFT_FORM)
        else:
            yield older
            renamed = ("missing modules", "no targets", "unnamed modules", "files")
            yield from (found for found in react(subject, PEFT_FORM) if found.feature not in renamed)
        yield from _swapped(subject)
        start = initialisation(subject)
        if start is not None and quantised_base(subject) is not None:
            text = f"{start}; PEFT cannot take it from quantised weights"
            yield Finding(feature="initialisation", level="refused", found=text)

    def exported(self, subject: Subject) -> Iterator[Finding]:
        for found in () if subject.has_cores else uniform_form(subject):  # the fold keeps all that PEFT reads
            if found.feature != "experts" or not joins_experts(subject):
                yield found

    def export(self, subject: Subject) -> str:
        if subject.has_cores:
            return command(subject, "fold", ending="-folded")
        return command(subject, "vllm", ending="-uniform")
