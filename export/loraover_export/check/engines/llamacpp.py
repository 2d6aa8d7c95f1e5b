"""llama.cpp: PEFT's form through its converter, the exported form through `loraover export gguf`.

Source: convert_lora_to_gguf.py and src/llama-adapter.cpp of ggml-org/llama.cpp, the former at 0b03adaa632b; the scaling
and the norms were measured on build b11739 (`llama-cpp-py-sync` 0.11739).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import final

from loraover.checkpoint.peft_adapter import AdapterDir, read_on_base
from loraover.models.load import ModelSource
from loraover_export.check.engines.base import (
    ADAPTER,
    CORES,
    LOST,
    NOT_NUMBERS,
    OTHER_BASE,
    EngineRules,
    Target,
    Written,
    command,
    note,
    react,
    refused,
    refused_by,
    silent,
)
from loraover_export.check.report import EngineFinding
from loraover_export.check.subject import Subject
from loraover_export.formats.gguf.target import FAMILIES, read_target, refuse_or_leave_out
from loraover_export.formats.vllm.candidate import listed

ONE_ALPHA = (
    "the converter writes a single lora_alpha, and llama.cpp multiplies B A by lora_alpha / rank of the matrices"
)
ROTATED = {"q_proj", "k_proj"}
UNKNOWN_TENSOR = refused("the converter stops at tensors other than A and B")

PEFT_FORM = {
    "method": UNKNOWN_TENSOR,
    "DoRA": UNKNOWN_TENSOR,
    "variant": silent("the converter does not read this field"),
    "aLoRA": note("the converter writes the invocation tokens, and llama.cpp's server applies the adapter after them"),
    "experts": refused("the converter finds no tensor of the base model by these names"),
    "initialisation": silent("the converter does not read this field"),
    "lost initialisation": silent("the converter does not read this field"),
    "other initialisation": silent("the converter does not read this field"),
    "biases": UNKNOWN_TENSOR,
    "LoRA bias": UNKNOWN_TENSOR,
    "modules_to_save": UNKNOWN_TENSOR,
    "trained vocabulary": UNKNOWN_TENSOR,
    "norms": silent("the converter writes it, and llama.cpp loads it but never applies it"),
    "trained tokens": UNKNOWN_TENSOR,
    "rsLoRA": silent(ONE_ALPHA),
    "alpha_pattern": silent(ONE_ALPHA),
    "no alpha": refused("the converter stops with a KeyError"),
    "rank": silent("llama.cpp scales by the rank of the matrices"),
    "key prefix": note("the converter accepts these keys too"),
    "doubled prefix": note("the converter removes the prefix, however often it occurs"),
    "missing modules": refused("llama.cpp refuses names that its model does not have"),
    "absent layers": refused("llama.cpp refuses names that its model does not have"),
    "lost matrices": refused("the converter stops there"),
    "unnamed modules": silent("the converter does not read these fields, and writes all matrices"),
    "numbers": NOT_NUMBERS,
    "lost modules": LOST,
    "lost parameters": LOST,
    "other shapes": refused("llama.cpp refuses shapes that its model does not have"),
    "tied embedding": silent("llama.cpp applies the adapter to the head as well, or aborts"),
    "tied head": refused("llama.cpp has no weight of the head"),
    "quantised base": OTHER_BASE,
    "cores": CORES,
}


@final
class LlamaCppRules(EngineRules):
    """llama.cpp, which reads GGUF only."""

    reader = "llama.cpp, its converter"
    extra = "llamacpp"

    def as_it_is(self, subject: Subject) -> Iterator[EngineFinding]:
        yield from react(subject, PEFT_FORM)
        family = FAMILIES.get(subject.served.architecture)
        rotated = sorted(ROTATED & {path.rpartition(".")[2] for path in subject.modules})
        if family is not None and family.interleaved and rotated:
            found = (
                f"llama.cpp keeps the rows of {listed(rotated)} in another order; the converter reorders B in the "
                "same way"
            )
            yield EngineFinding(feature="row order", level="note", found=found)

    def exported(self, subject: Subject) -> Iterator[EngineFinding]:
        def check(adapter: AdapterDir, base: ModelSource) -> None:
            target = read_target(base)
            refuse_or_leave_out(read_on_base(adapter, target.served.experts), target)

        yield from refused_by(check, subject)

    def export(self, subject: Subject) -> str:
        return command(subject, "gguf", ending=".gguf")

    def write(self, source: Path, folder: Path, target: Target) -> Written:
        from loraover_export.formats.gguf.run import export_gguf

        report = export_gguf(source, folder / f"{ADAPTER}.gguf", model=target.model, dtype=target.dtype)
        (folder / "gguf_report.json").write_text(report.model_dump_json(indent=1) + "\n")
        return Written(f"{ADAPTER}.gguf", "gguf_report.json", report.rank, report.matrices)
