"""Check of a written graph by the onnx package's checker."""

from __future__ import annotations

from pathlib import Path

import onnx

from loraover.common.errors import ExportError

# ONNX Runtime registers these among the standard operators; the standard's own checker does not know them.
RUNTIME_OPERATORS = ("SimplifiedLayerNormalization",)


def check_file(graph: Path) -> None:
    """Check the structure, the types of standard operators and the external data of a graph.

    Raises:
        ExportError: What the checker found.
    """
    model = onnx.load(graph, load_external_data=False)
    for node in model.graph.node:
        if node.op_type in RUNTIME_OPERATORS and node.domain == "":
            node.domain = "com.microsoft"
    copy = graph.with_name(f".{graph.name}.check")  # in the graph's folder, where its external data is
    try:
        onnx.save(model, copy)
        onnx.checker.check_model(copy)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{graph.name}: the onnx checker refuses it: {error}") from error
    finally:
        copy.unlink(missing_ok=True)
