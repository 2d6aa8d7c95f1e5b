"""ONNX Runtime: PEFT's form through the builder of onnxruntime-genai, the exported form through our own graphs.

The builder (`adapter_path`) loads the adapter's folder with PEFT and takes A, B and the scaling of each linear layer;
its reactions were measured with 0.18 on tiny models. Olive (`convert-adapters`), which reads such a folder as well, is
noted where it differs. Source: olive/cli/convert_adapters.py of microsoft/Olive at 19fd0567b1c9.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import final

from loraover.checkpoint.source import read_source
from loraover.common.errors import ExportError
from loraover.common.strict_json import read_json
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
    more_than_ab,
    note,
    react,
    refused,
    refused_by,
    silent,
)
from loraover_export.check.features import adapted_head
from loraover_export.check.report import EngineFinding
from loraover_export.check.subject import Subject
from loraover_export.formats.onnx.inputs import check_swappable, find_task
from loraover_export.publishing import ONNX

ONE_SCALING = note("the builder is right, but Olive scales every module by lora_alpha and r")
NO_INPUTS = note("the builder is right, but Olive writes tensors that its graph has no inputs for")
NOT_LOADED = silent("PEFT, which the builder uses, ignores such matrices with only a Python warning")

PEFT_FORM = {
    "task": refused("the builder builds causal language models only"),
    "method": silent("the builder builds the graph of the base model"),
    "DoRA": silent("the builder drops the magnitudes; Olive refuses it"),
    "variant": silent("the builder reads A and B as a plain LoRA"),
    "aLoRA": silent("the graph applies it to every token"),
    "experts": refused("the builder finds no weights of the experts"),
    "initialisation": note("the builder is right, but Olive pairs A and B with the unchanged base weights"),
    "lost initialisation": silent(
        "PEFT, which the builder uses, computes other first factors and pairs A and B with other weights"
    ),
    "other initialisation": refused("PEFT, which the builder uses, cannot repeat this initialisation"),
    "megatron": refused("PEFT, which the builder uses, must import Megatron for this"),
    "LoRA bias": silent("the builder drops it"),
    "modules_to_save": NO_INPUTS,
    "trained vocabulary": NO_INPUTS,
    "norms": NO_INPUTS,
    "trained tokens": silent("the builder uses the embedding without these tokens"),
    "alpha_pattern": ONE_SCALING,
    "rank_pattern": ONE_SCALING,
    "rank": refused("PEFT, which the builder uses, cannot load it"),
    "key prefix": NOT_LOADED,
    "doubled prefix": NOT_LOADED,
    "missing modules": NOT_LOADED,
    "absent layers": note(
        "PEFT, which the builder uses, ignores them, which is right for a base model without these layers"
    ),
    "no targets": refused("PEFT, which the builder uses, loads no adapter without a module to adapt"),
    "lost matrices": silent("PEFT, which the builder uses, initialises the missing matrix anew"),
    "unnamed modules": NOT_LOADED,
    "numbers": NOT_NUMBERS,
    "lost modules": LOST,
    "lost parameters": refused("PEFT, which the builder uses, cannot load it"),
    "other shapes": refused("PEFT, which the builder uses, cannot load it"),
    "embedding": silent("the builder leaves out its adapter"),
    "adapted head": refused("the builder's graph is invalid, and ONNX Runtime does not load it"),
    "quantised base": OTHER_BASE,
    "cores": CORES,
}

MERGEABLE = ("biases", "modules_to_save", "trained vocabulary", "norms")
"""Features beyond A and B that only a merged graph holds; without tensors of them, a swappable graph is right too."""


@final
class OnnxRules(EngineRules):
    """ONNX Runtime and onnxruntime-genai."""

    reader = "onnxruntime-genai 0.18"
    extra = "export"
    model_is = "the folder of a swappable export"

    def as_it_is(self, subject: Subject) -> Iterator[EngineFinding]:
        yield from react(subject, PEFT_FORM)

    def exported(self, subject: Subject) -> Iterator[EngineFinding]:
        yield from (found for found in more_than_ab(subject) if found.feature not in MERGEABLE)
        if subject.lora is not None:
            yield from refused_by(lambda adapter, base: find_task(adapter.config.task_type, base), subject)

    def export(self, subject: Subject) -> str:
        mode = "swappable"
        if subject.lora is not None:
            try:
                check_swappable(subject.lora)
            except ExportError:
                mode = "merged"
            if subject.served.is_causal and adapted_head(subject) is not None:
                mode = "merged"  # the builder's graph is invalid with inputs there
        return command(subject, "onnx", "--mode", mode, ending="-onnx")

    def write(self, source: Path, folder: Path, target: Target) -> Written:
        """Write an adapter for the graph of an earlier swappable export, whose number format it takes."""
        from loraover_export.formats.onnx.run import export_onnx

        report = export_onnx(
            [source],
            folder / ADAPTER,
            mode="swappable",
            graph=target.model,
            model=self.base(target.model),
            names=[ADAPTER],
            check=False,
        )
        return Written(ADAPTER, f"{ADAPTER}/{ONNX.certificate}", read_source(source).rank, report.matrices)

    def base(self, model: str) -> str:
        from loraover_export.formats.onnx.report import OnnxReport

        return read_json(Path(model) / ONNX.certificate, OnnxReport).base_model

    def files(self, model: str) -> list[Path]:
        from loraover_export.formats.onnx.report import LAYOUT_FILE

        return [Path(model) / ONNX.certificate, Path(model) / LAYOUT_FILE]
