"""OpenVINO GenAI, which reads the tensors of PEFT's form and never its configuration.

Source: src/cpp/src/lora/adapter.cpp and src/cpp/src/llm/pipeline_stateful.cpp of openvinotoolkit/openvino.genai at
da1db864d2bc (after 2026.3); scaling and prefix were measured on 2026.4. It
never applies an adapter to a base model that it reads from GGUF, which the adapter's files do not show.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from loraover_export.check.engines.base import (
    CORES,
    LOST,
    NOT_NUMBERS,
    OTHER_BASE,
    command,
    note,
    react,
    refused,
    silent,
)
from loraover_export.check.engines.vllm import UniformRules, uniform_form
from loraover_export.check.report import EngineFinding
from loraover_export.check.subject import Subject

MISSING = silent("OpenVINO writes a warning to standard error, and answers without these modules")
MISPLACED = note("OpenVINO applies them nevertheless, since it matches any module whose name contains theirs")
NOT_READ = silent("OpenVINO does not read adapter_config.json")
IGNORED = silent("OpenVINO ignores such tensors")

PEFT_FORM = {
    "task": refused("OpenVINO's LLMPipeline runs causal language models only"),
    "method": silent("OpenVINO ignores such tensors, and answers as the base model"),
    "DoRA": silent("OpenVINO ignores the magnitudes"),
    "variant": NOT_READ,
    "aLoRA": NOT_READ,
    "experts": IGNORED,
    "initialisation": NOT_READ,
    "lost initialisation": NOT_READ,
    "other initialisation": NOT_READ,
    "biases": IGNORED,
    "LoRA bias": IGNORED,
    "modules_to_save": IGNORED,
    "trained vocabulary": note("by its source code, OpenVINO replaces such a weight; this was not run here"),
    "norms": IGNORED,
    "trained tokens": IGNORED,
    "rank": silent("OpenVINO reads neither rank nor alpha"),
    "scaling": silent("OpenVINO multiplies B A by the alpha that the program gives, 1 by default"),
    "key prefix": silent("OpenVINO ignores such keys, and answers as the base model"),
    "absent layers": note("OpenVINO ignores them, which is right for a base model without these layers"),
    "doubled prefix": silent("OpenVINO ignores such keys, and answers as the base model"),
    "unnamed modules": silent("OpenVINO does not read adapter_config.json, and applies all matrices"),
    "numbers": NOT_NUMBERS,
    "lost modules": LOST,
    "lost parameters": LOST,
    "other shapes": refused("OpenVINO cannot set a state of another shape"),
    "embedding": silent("OpenVINO reads only lora_A and lora_B, and ignores lora_embedding_A and lora_embedding_B"),
    "quantised base": OTHER_BASE,
    "cores": CORES,
}
UNIFORM_FORM = {name: PEFT_FORM[name] for name in ("task", "embedding", "quantised base")}


@final
class OpenVinoRules(UniformRules):
    """OpenVINO GenAI."""

    reader = "OpenVINO GenAI 2026.4"

    def as_it_is(self, subject: Subject) -> Iterator[EngineFinding]:
        is_placed = all(any(path in name for name in subject.served.modules) for path in subject.modules)
        yield from react(subject, PEFT_FORM | {"missing modules": MISPLACED if is_placed else MISSING})

    def exported(self, subject: Subject) -> Iterator[EngineFinding]:
        yield from uniform_form(subject)
        if subject.lora is not None:
            yield from react(subject, UNIFORM_FORM | ({"experts": IGNORED} if subject.lora.stacks else {}))

    def export(self, subject: Subject) -> str:
        return command(subject, "vllm", ending="-uniform")
