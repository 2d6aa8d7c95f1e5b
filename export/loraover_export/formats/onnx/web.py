"""Adapters for onnxruntime-web: safetensors files with a tensor for every LoRA input of a graph.

onnxruntime-web 1.30 refuses inputs that have a default, and reads no `.onnx_adapter` files. So the inputs are required
here, and an adapter file fills all of them. Matrices of rank 0, A (in_features, 0) and B (0, out_features), leave a
module as it is in the base model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import onnx
import torch
from torch import Tensor

from loraover.checkpoint.tensor_file import open_tensors, save_tensors
from loraover.common.dtypes import DTYPES
from loraover.common.strict_json import read_json
from loraover_export.formats.onnx.layout import LAYOUT_FILE, SwappableLayout

WEB_SUFFIX = ".safetensors"


def require_inputs(model: onnx.ModelProto, inputs: Collection[str]) -> None:
    """Remove the defaults of these inputs from a graph; the graph is changed."""
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in inputs]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def empty_tensors(layout: SwappableLayout, graph: str) -> dict[str, Tensor]:
    """Return matrices of rank 0 for every LoRA input of a graph, by input."""
    dtype = getattr(torch, DTYPES[layout.dtype])
    return {
        place.input: torch.zeros((place.features, 0) if site.endswith("lora_A") else (0, place.features), dtype=dtype)
        for site, place in layout.places.items()
        if place.graph == graph
    }


def write_tensors(path: Path, layout: SwappableLayout, graph: str, matrices: Mapping[str, Tensor]) -> None:
    """Write the matrices of an adapter, and matrices of rank 0 for the modules that it does not adapt.

    Args:
        path: The file to write.
        layout: Inputs of the graphs.
        graph: File name of the graph.
        matrices: The adapter's matrices, in the layout of the graph, by input.
    """
    save_tensors(empty_tensors(layout, graph) | dict(matrices), path, ("base_model", layout.base_model))


def lora_feed(graph: Path, adapter: Path | None) -> dict[str, Tensor]:
    """Return what a graph needs in its required LoRA inputs; nothing if they have defaults.

    Args:
        graph: Path of the graph, with `swappable.json` beside it if it is swappable.
        adapter: The adapter's safetensors file; None gives the base model.

    Raises:
        CheckpointError: A file that is damaged.
    """
    if not (graph.parent / LAYOUT_FILE).is_file():
        return {}
    layout = read_json(graph.parent / LAYOUT_FILE, SwappableLayout)
    if not layout.web:
        return {}
    if adapter is None:
        return empty_tensors(layout, graph.name)
    with open_tensors(adapter) as file:
        return {name: file.read(name) for name in file.keys}
