"""The ONNX graphs that adapters are run on: built for the run, or the graph of an earlier swappable export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loraover.common.errors import EngineError, ExportError
from loraover.models.load import ModelSource
from loraover_export.onnx.export import read_earlier
from loraover_export.onnx.run import export_onnx
from loraover_serve.engines.onnx import OnnxArm


def check_graph(graph: Path, base: ModelSource) -> None:
    """Check that onnxruntime-genai can run an earlier export with other adapters of the same base model.

    Args:
        graph: folder of the export.
        base: base model of the adapters.

    Raises:
        CheckpointError: no ONNX export in the folder.
        ExportError: a merged export, one of another base model, or one in a form that onnxruntime-genai cannot run.
    """
    earlier = read_earlier(graph, base)
    if earlier.web or not earlier.cache:
        option = "--web" if earlier.web else "--no-cache"
        raise ExportError(
            f"{graph} was exported with {option}, and onnxruntime-genai cannot run such a graph; export one without "
            "it, or name none to have one built."
        )


def merged_arm(adapter: Path, output: Path, base: ModelSource) -> OnnxArm:
    """Build a graph with an adapter merged into its weights.

    Args:
        adapter: folder of the adapter or checkpoint.
        output: new folder for the graph.
        base: base model of the adapter.

    Raises:
        EngineError: a matrix beyond its error bound.
        ExportError: a model or an adapter that cannot be written as a graph.
    """
    _export({"adapter": adapter}, output, "merged", base)
    return OnnxArm(output)


def swappable_arms(
    adapters: Mapping[str, Path], output: Path, base: ModelSource, graph: Path | None = None
) -> dict[str, OnnxArm]:
    """Write adapters for one graph; without an adapter, that graph answers as the base model.

    Args:
        adapters: folders of the adapters or checkpoints, by the names of their arms.
        output: new folder for the adapters' files, and for the graph if it is built.
        base: base model of the adapters.
        graph: folder of an earlier swappable export, whose graph is used; None builds one.

    Returns:
        The arms of the adapters, by the same names.

    Raises:
        EngineError: a matrix beyond its error bound.
        ExportError: a model or an adapter that cannot be written, or an earlier graph that the adapters do not fit.
    """
    _export(adapters, output, "swappable", base, graph)
    return {name: OnnxArm(graph or output, output / f"{name}.onnx_adapter") for name in adapters}


def _export(
    adapters: Mapping[str, Path], output: Path, mode: str, base: ModelSource, graph: Path | None = None
) -> None:
    """Export adapters without the export's own comparison with PyTorch."""
    paths, names = tuple(adapters.values()), tuple(adapters) if mode == "swappable" else ()
    found = export_onnx(paths, output, mode=mode, model=base.name, names=names, graph=graph, check=False)
    if found.verdict == "failed":
        raise EngineError(f"onnx: a matrix of the {mode} export is not within its error bound.")
