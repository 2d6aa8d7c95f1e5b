"""The ONNX export of adapters: read, export, check, publish."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loraover.common.atomic_output import AbandonedError, check_replaceable, publish_directory
from loraover.common.dtypes import DTYPES
from loraover.common.reporter import SILENT, Reporter
from loraover.models.licence import known_licence
from loraover.reporting.model_card import model_card
from loraover_export.numerics.matrix_certificate import matrix_facts
from loraover_export.onnx.export import Export
from loraover_export.onnx.report import REPORT_FILE, OnnxReport
from loraover_export.onnx.request import Inputs, OnnxRequest, read_inputs

SHORT = {DTYPES[short]: short for short in ("fp32", "fp16")}


def export_onnx(
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    mode: str,
    precision: str | None = None,
    device: str | None = None,
    model: str | Path | None = None,
    cache: bool = True,
    names: Sequence[str] = (),
    graph: str | Path | None = None,
    web: bool = False,
    check: bool = True,
    check_device: str = "auto",
    compute_dtype: str = "fp32",
    force: bool = False,
    report: Reporter = SILENT,
) -> OnnxReport:
    """Write ONNX graphs with an adapter merged into the weights, or with adapters to swap at run time.

    Args:
        sources: folders of LoRA-Over checkpoints, folded adapters or plain PEFT LoRAs; exactly one for a merged graph.
        output: new folder for the graphs, the adapters' files, the report and a model card.
        mode: "merged" adds the adapter to the graph's weights; "swappable" writes a graph that takes A and B as
            inputs, and a file with them for each adapter.
        precision: number format of the graph's weights: "fp32", "fp16" or "int4"; or PyTorch's names of the first two.
            None means that of `graph`, else "fp32".
        device: device to build the graph for: "cpu" or "cuda"; None means that of `graph`, else "cpu".
        model: base model, folder or hub name; None means the one that the adapters name.
        cache: give a decoder model's graph a KV cache; an encoder-decoder model always has one, a classifier none.
        names: names of a swappable graph's adapters, in the order of `sources`; empty means those of their folders.
        graph: folder of an earlier swappable export whose graph the new adapters are for; only their files are
            written, and `precision`, `device` and `cache` have to be those of that export.
        web: form for onnxruntime-web: the LoRA inputs of a swappable graph are required, and adapters are safetensors
            files.
        check: compare ONNX Runtime's outputs with those of the PyTorch reference.
        check_device: device that PyTorch runs on for the check: "auto" (the first that is there of cuda, mps and cpu),
            "cpu", "cuda", "mps", or one GPU such as "cuda:1". `device` is where the graph will run.
        compute_dtype: data type that PyTorch runs in for the check: "fp32", "bf16", "fp16" or "fp64".
        force: replace an ONNX export that is already at `output`.
        report: receiver of progress.

    Returns:
        The report, which the output holds too. If its verdict is "failed", nothing was written. If it is
        "inconclusive", the export was written, but an adapter changes logits too little for the check to distinguish
        it from one that does nothing.

    Raises:
        ConfigError: arguments that cannot be used, a base model that cannot be loaded, or memory that does not
            suffice for the check; the message says what would fit.
        CheckpointError: an adapter that cannot be trusted, or that belongs to another base model.
        ExportError: a model or an adapter that no graph can be written for.
        FoldError: an element beyond the range of the graph's data type.
        OutputError: an output that cannot be written, or that exists and may not be replaced.
    """
    folders = [sources] if isinstance(sources, str | Path) else sources
    request = OnnxRequest(
        tuple(map(Path, folders)),
        Path(output),
        mode,
        None if precision is None else SHORT.get(precision, precision),
        device,
        None if model is None else str(model),
        cache,
        (names,) if isinstance(names, str) else tuple(names),
        None if graph is None else Path(graph),
        web,
        check,
        check_device,
        compute_dtype,
        force,
    )
    read = [*request.sources, *(() if request.graph is None else (request.graph,))]
    check_replaceable(request.output, "ONNX export", REPORT_FILE, inputs=read, replace=request.force)
    inputs = read_inputs(request, report.line)
    with publish_directory(request.output, outside=request.sources[0], replace=request.force) as draft:
        export = Export(request, inputs, draft, report)
        result = export.run()
        if result.verdict == "failed":
            raise AbandonedError
        (draft / REPORT_FILE).write_text(result.model_dump_json(indent=1) + "\n")
        (draft / "README.md").write_text(_card(export.request, inputs, result), encoding="utf-8")
    return result


def _card(request: OnnxRequest, inputs: Inputs, result: OnnxReport) -> str:
    facts: dict[str, str] = {"mode": result.mode, "precision": result.precision, "verdict": result.verdict}
    facts |= {f"adapter {name}": source for name, source in result.adapters.items()}
    for check in result.checks:
        facts[f"max {check.quantity} error, {check.adapter or 'no adapter'}"] = (
            f"{check.error:.2e}, allowed {check.bound:.2e}"
        )
    facts |= matrix_facts(result.matrices) | inputs.base.facts()
    licence = known_licence(result.base_model, inputs.base.revision)
    kind = "ONNX graphs, with their LoRA adapters,"
    return model_card(
        "ONNX export", result.base_model, facts, request.command(), licence=licence, kind=kind, library="onnx"
    )
