"""Graphs whose LoRA matrices are inputs and the files of adapters that fill them.

The inputs have zeros as default, and an adapter is an `.onnx_adapter` file. A graph for onnxruntime-web has inputs
without a default, and an adapter is a safetensors file with a tensor for each of them; see `web`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from torch import Tensor

from loraover.adapters.numerics.delta import Delta
from loraover.adapters.numerics.matrix_certificate import MatrixCertificate, certify
from loraover.adapters.numerics.rounding import round_tensor
from loraover.checkpoint.files import CONFIG_FILE, TENSORS_FILE
from loraover.checkpoint.peft_adapter import site_key
from loraover.checkpoint.tensor_file import save_tensors
from loraover.common.errors import ExportError
from loraover_export.formats.onnx.layout import LAYOUT_FILE, AdapterInput, SwappableLayout
from loraover_export.formats.onnx.web import WEB_SUFFIX, require_inputs, write_tensors
from loraover_export.requests import OnnxRequest

ADAPTER_SUFFIX = ".onnx_adapter"


def markers(deltas: Iterable[Delta], rank: int) -> dict[str, Tensor]:
    """Draw a random matrix for every A and B, by whose values its place is found in a graph, whatever its name there.

    The elements are drawn from [1, 2), where matrices still differ in float16.

    Args:
        deltas: The modules to adapt.
        rank: Rank of the matrices.

    Returns:
        A, (rank, in_features), and B, (out_features, rank), by name.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for delta in deltas:
        sizes = {"A": (rank, delta.a.value.shape[1]), "B": (delta.b.value.shape[0], rank)}
        for matrix, size in sizes.items():
            drawn[f"{delta.module}.lora_{matrix}"] = 1 + torch.rand(size, generator=generator)
    return drawn


def write_marker_adapter(folder: Path, drawn: Mapping[str, Tensor], rank: int) -> None:
    """Write the markers as a PEFT adapter with scaling 1."""
    folder.mkdir()
    save_tensors({site_key(name): marker for name, marker in drawn.items()}, folder / TENSORS_FILE)
    modules = sorted({name.rpartition(".")[0] for name in drawn})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "inference_mode": True}
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"target_modules": modules}))


def open_inputs(model: onnx.ModelProto, graph: Path, drawn: Mapping[str, Tensor]) -> dict[str, AdapterInput]:
    """Turn the initializers that hold markers into graph inputs, with zeros of rank 1 as default.

    The rank of each input is a free dimension, so that an adapter of any rank fits.

    Args:
        model: The graph without its external data; it is changed.
        graph: The graph's file.
        drawn: Markers to look for; some may be in another graph.

    Returns:
        The inputs, by the names of the markers.
    """
    by_start = _by_first_element(drawn)
    shapes = {tuple(marker.mT.shape) for marker in drawn.values()}
    places = {}
    for initializer in model.graph.initializer:
        if tuple(initializer.dims) not in shapes:
            continue
        if external_data_helper.uses_external_data(initializer):
            external_data_helper.load_external_data_for_tensor(initializer, str(graph.parent))
            initializer.data_location = TensorProto.DEFAULT
            del initializer.external_data[:]
        held = numpy_helper.to_array(initializer)
        for name in by_start.get(held.flat[0].item(), ()):
            if not np.array_equal(held, drawn[name].mT.numpy().astype(held.dtype)):
                continue
            is_a = name.endswith("lora_A")
            features = initializer.dims[0 if is_a else 1]
            rank = f"{name.rpartition('.')[0]}.rank"  # ONNX Runtime would share buffers between ranks of one name
            dims = (features, rank) if is_a else (rank, features)
            value = helper.make_tensor_value_info(initializer.name, initializer.data_type, dims)
            model.graph.input.append(value)
            zeros = np.zeros((features, 1) if is_a else (1, features), held.dtype)
            initializer.CopyFrom(numpy_helper.from_array(zeros, initializer.name))
            places[name] = AdapterInput(graph=graph.name, input=initializer.name, features=features)
            break
    _forget_shapes(model, {place.input for place in places.values()})
    return places


def _by_first_element(drawn: Mapping[str, Tensor]) -> dict[float, list[str]]:
    """Return the names of the markers by their first element, as float32 and as float16 hold it."""
    names: dict[float, list[str]] = {}
    for name, marker in drawn.items():
        start = marker[0, 0]
        for held in (start, start.half()):
            names.setdefault(held.item(), []).append(name)
    return names


def _forget_shapes(model: onnx.ModelProto, inputs: set[str]) -> None:
    """Drop the inferred shapes of these inputs' direct results, which name a fixed rank."""
    outputs = {output for node in model.graph.node if inputs & set(node.input) for output in node.output}
    kept = [value for value in model.graph.value_info if value.name not in outputs]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)


def write_swappable(
    folder: Path, graphs: Sequence[str], drawn: Mapping[str, Tensor], base_model: str, dtype: str, *, web: bool = False
) -> SwappableLayout:
    """Give exported graphs their LoRA inputs, and list these in `swappable.json`.

    Args:
        folder: Folder of the export.
        graphs: File names of its graphs.
        drawn: Markers that the graphs were exported with.
        base_model: Folder or hub name of the base model.
        dtype: Data type of the LoRA inputs.
        web: Leave the inputs without a default.

    Raises:
        ExportError: A marker that no graph holds.
    """
    places: dict[str, AdapterInput] = {}
    for name in graphs:
        graph = folder / name
        model = onnx.load(graph, load_external_data=False)
        places |= open_inputs(model, graph, drawn)
        if web:
            require_inputs(model, {place.input for place in places.values()})
        graph.write_bytes(model.SerializeToString())
    missing = sorted(drawn.keys() - places.keys())
    if missing:
        raise ExportError(
            f"the graph has no place for {len(missing)} of {len(drawn)} matrices, first {missing[0]}; "
            f"use {OnnxRequest.named('mode', 'merged')}, which changes the weights themselves."
        )
    layout = SwappableLayout(base_model=base_model, dtype=dtype, web=web, places=places)
    (folder / LAYOUT_FILE).write_text(layout.model_dump_json(indent=1) + "\n")
    return layout


def adapter_file(adapter: Path | None, graph: str, graphs: Sequence[str]) -> Path | None:
    """Return the file that holds an adapter's matrices for one graph; None if it has none for that graph.

    The file is `name.onnx_adapter` if there is one graph, and `name.encoder.onnx_adapter` or
    `name.decoder.onnx_adapter` if there are two. Files for onnxruntime-web end in `.safetensors`.

    Args:
        adapter: Path of the adapter's files without their endings; None for no adapter.
        graph: File name of the graph.
        graphs: File names of all graphs of the export.
    """
    if adapter is None:
        return None
    files = adapter_files(adapter, graph, graphs)
    return next((file for file in files if file.is_file()), None if len(graphs) > 1 else files[0])


def adapter_files(adapter: Path, graph: str, graphs: Sequence[str]) -> list[Path]:
    """Return the two files of which an export has one if the adapter changes a graph.

    Args:
        adapter: Path of the adapter's files without their endings.
        graph: File name of the graph.
        graphs: File names of all graphs of the export.
    """
    return [_file_of(adapter, graph, graphs, suffix) for suffix in (ADAPTER_SUFFIX, WEB_SUFFIX)]


def _file_of(adapter: Path, graph: str, graphs: Sequence[str], suffix: str) -> Path:
    stem = "" if len(graphs) == 1 else f".{Path(graph).stem}"
    return adapter.with_name(f"{adapter.name}{stem}{suffix}")


def write_adapter(
    adapter: Path, layout: SwappableLayout, graphs: Sequence[str], deltas: Iterable[Delta]
) -> list[MatrixCertificate]:
    """Write an adapter's files: A transposed, and scaling * B transposed.

    Args:
        adapter: Path of the files without their endings.
        layout: Inputs of the graphs.
        graphs: File names of the graphs.
        deltas: The adapter's modules.

    Returns:
        One certificate for each matrix: the error of the written one against float64, and its bound.

    Raises:
        ExportError: A module that the graph has no inputs for, or inputs of another size.
        FoldError: An element beyond the range of the inputs' dtype.
    """
    matrices: dict[str, dict[str, Tensor]] = {}
    certificates = []
    for delta in deltas:
        for matrix, exact in (("A", delta.a), ("B", delta.b)):
            name = f"{delta.module}.lora_{matrix}"
            place = _place(layout, name, exact.value.shape[1 if matrix == "A" else 0])
            rounded = round_tensor(name, exact.value, layout.dtype)
            certificates.append(certify(name, rounded, exact))
            matrices.setdefault(place.graph, {})[place.input] = rounded.mT.contiguous()
    for graph in graphs:
        if layout.web:
            write_tensors(_file_of(adapter, graph, graphs, WEB_SUFFIX), layout, graph, matrices.get(graph, {}))
        elif graph in matrices:
            _write_native(_file_of(adapter, graph, graphs, ADAPTER_SUFFIX), matrices[graph])
    return certificates


def _write_native(path: Path, matrices: Mapping[str, Tensor]) -> None:
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(matrix.numpy()) for name, matrix in matrices.items()})
    file.export_adapter(str(path))


def _place(layout: SwappableLayout, name: str, features: int) -> AdapterInput:
    place = layout.places.get(name)
    if place is None:
        raise ExportError(
            f"the graph has no input for {name}; it was exported for other target modules. Export one graph for all "
            "your adapters: loraover export onnx A B ... --mode swappable."
        )
    if place.features != features:
        raise ExportError(
            f"{name} has {features} features, but the graph's input {place.input} has {place.features}; the adapter "
            f"belongs to another base model than the graph's, {layout.base_model}."
        )
    return place
