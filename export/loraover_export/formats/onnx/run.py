"""The ONNX export of adapters: read, export, check, publish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loraover.adapters.numerics.matrix_certificate import matrix_facts
from loraover.checkpoint.carried_files import keep_chat_template
from loraover.sources.verb import verb
from loraover_export.formats.onnx.export import Export
from loraover_export.formats.onnx.inputs import Inputs, read_inputs
from loraover_export.formats.onnx.report import OnnxReport
from loraover_export.formats.onnx.swappable import adapter_files
from loraover_export.publishing import ONNX
from loraover_export.requests import OnnxRequest


@verb(OnnxRequest)
def export_onnx(request: OnnxRequest) -> OnnxReport:
    """Write ONNX graphs with an adapter merged into the weights, or with adapters to swap at run time.

    A swappable graph takes A and B as inputs, and each adapter becomes a file with them. Adapters for the graph of an
    earlier export need the precision, device and cache of that graph, which are the defaults then. In the form for
    onnxruntime-web, the LoRA inputs are required, and adapters are safetensors files.

    Returns:
        The report, which the output holds too. If its verdict is "failed", nothing was written. If it is
        "inconclusive", the export was written, but an adapter changes logits too little for the check to distinguish
        it from one that does nothing.

    Raises:
        ConfigError: Arguments that cannot be used, a base model that cannot be loaded, or memory that does not
            suffice for the check; the message says what would fit.
        CheckpointError: An adapter that cannot be trusted, or that belongs to another base model.
        ExportError: A model or an adapter that no graph can be written for.
        FoldError: An element beyond the range of the graph's data type.
        OutputError: An output that cannot be written, or that exists and may not be replaced.
    """
    read = [*request.sources, *(() if request.graph is None else (request.graph,))]
    ONNX.check_output(request, *read)
    inputs = read_inputs(request)
    with ONNX.draft(request, request.sources[0]) as draft:
        export = Export(request, inputs, draft.folder)
        result, draft = export.run(), replace(draft, request=export.request)
        for name, adapter in inputs.adapters.items():
            keep_chat_template(adapter.path, draft.folder, stem=None if result.mode == "merged" else name)
        result = draft.seal(result)
        draft.describe(result.base_model, inputs.base.revision, _facts(inputs, result))
        for name, adapter in inputs.adapters.items():
            files = [
                path.name for path in draft.folder.iterdir() if _is_of(path, name, result.mode, export.kind.graphs)
            ]
            draft.keep_reference(adapter.path, files, stem=name)
    return result


def _is_of(path: Path, adapter: str, mode: str, graphs: Sequence[str]) -> bool:
    """Whether a file of an export holds numbers of an adapter: of a merged one, every file with numbers does."""
    if mode == "merged":
        return path.is_file() and path.suffix not in (".json", ".md")
    return path.name in {file.name for graph in graphs for file in adapter_files(Path(adapter), graph, graphs)}


def _facts(inputs: Inputs, result: OnnxReport) -> dict[str, str]:
    facts: dict[str, str] = {"mode": result.mode, "precision": result.precision, "verdict": result.verdict}
    facts |= {f"adapter {name}": source for name, source in result.adapters.items()}
    for check in result.checks:
        facts[f"max {check.quantity} error, {check.adapter or 'no adapter'}"] = (
            f"{check.error:.2e}, allowed {check.bound:.2e}"
        )
    return facts | matrix_facts(result.matrices) | inputs.base.facts()
