"""Graphs whose LoRA matrices are inputs, and the files of adapters that fill them.

The inputs have zeros as default, and an adapter is an `.onnx_adapter` file. onnxruntime-web 1.30 refuses inputs that
have a default, and reads no such files. So the inputs of its graphs are required, and an adapter is a safetensors file
that fills all of them. Matrices of rank 0, A (in_features, 0) and B (0, out_features), leave a module as it is.
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
from loraover.checkpoint.tensor_file import open_tensors, save_tensors
from loraover.common.arrays import as_tensor
from loraover.common.errors import ExportError
from loraover.common.strict_json import read_json
from loraover.models.device import DTYPES
from loraover_export.formats.onnx.report import LAYOUT_FILE, AdapterInput, SwappableLayout
from loraover_export.requests import OnnxRequest


def markers(deltas: Iterable[Delta], rank: int) -> dict[str, Tensor]:
    """Draw a random matrix for every A and B, so that its place in a graph is found by its values, not by its name.

    The elements are drawn from [1, 2), where matrices still differ in float16.

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
    """
    by_start: dict[float, list[str]] = {}
    for name, marker in drawn.items():
        for start in (marker[0, 0], marker[0, 0].half()):  # as float32 and as float16 hold it
            by_start.setdefault(start.item(), []).append(name)
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
    # The inferred shapes of these inputs' direct results name a fixed rank.
    opened = {place.input for place in places.values()}
    outputs = {output for node in model.graph.node if opened & set(node.input) for output in node.output}
    kept = [value for value in model.graph.value_info if value.name not in outputs]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    return places


def write_swappable(
    folder: Path, graphs: Sequence[str], drawn: Mapping[str, Tensor], base_model: str, dtype: str, *, web: bool = False
) -> SwappableLayout:
    """Give exported graphs their LoRA inputs, and list these in `swappable.json`."""
    places: dict[str, AdapterInput] = {}
    for name in graphs:
        graph = folder / name
        model = onnx.load(graph, load_external_data=False)
        places |= open_inputs(model, graph, drawn)
        if web:  # inputs without a default are required
            opened = {place.input for place in places.values()}
            kept = [tensor for tensor in model.graph.initializer if tensor.name not in opened]
            del model.graph.initializer[:]
            model.graph.initializer.extend(kept)
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


def adapter_files(adapter: Path, graph: str, graphs: Sequence[str]) -> tuple[Path, Path]:
    """Return the paths that an adapter's file may have beside a graph: ONNX Runtime's and the web's.

    They are `name.onnx_adapter` and `name.safetensors` if there is one graph, and such as `name.encoder.onnx_adapter`
    if there are two.
    """
    stem = adapter.name if len(graphs) == 1 else f"{adapter.name}.{Path(graph).stem}"
    return adapter.with_name(f"{stem}.onnx_adapter"), adapter.with_name(f"{stem}.safetensors")


def adapter_file(adapter: Path | None, graph: str, graphs: Sequence[str]) -> Path | None:
    """Return the one of `adapter_files` that exists; None without an adapter, or if it does not change this graph."""
    if adapter is None:
        return None
    files = adapter_files(adapter, graph, graphs)
    return next((file for file in files if file.is_file()), None if len(graphs) > 1 else files[0])


def write_adapter(
    adapter: Path, layout: SwappableLayout, graphs: Sequence[str], deltas: Iterable[Delta]
) -> list[MatrixCertificate]:
    """Write an adapter's files: A transposed, and scaling * B transposed."""
    matrices: dict[str, dict[str, Tensor]] = {}
    certificates = []
    for delta in deltas:
        for matrix, exact in (("A", delta.a), ("B", delta.b)):
            name = f"{delta.module}.lora_{matrix}"
            place, features = layout.places.get(name), exact.value.shape[1 if matrix == "A" else 0]
            if place is None:
                raise ExportError(
                    f"the graph has no input for {name}; it was exported for other target modules. Export one graph "
                    "for all your adapters: loraover export onnx A B ... --mode swappable."
                )
            if place.features != features:
                raise ExportError(
                    f"{name} has {features} features, but the graph's input {place.input} has {place.features}; the "
                    f"adapter belongs to another base model than the graph's, {layout.base_model}."
                )
            rounded = round_tensor(name, exact.arrays().value, layout.dtype)
            certificates.append(certify(name, rounded, exact.arrays()))
            matrices.setdefault(place.graph, {})[place.input] = as_tensor(rounded).mT.contiguous()
    for graph in graphs:
        native, web = adapter_files(adapter, graph, graphs)
        if layout.web:  # with matrices of rank 0 for the modules that the adapter leaves as they are
            filled = empty_tensors(layout, graph) | matrices.get(graph, {})
            save_tensors(filled, web, ("base_model", layout.base_model))
        elif graph in matrices:
            file, values = ort.AdapterFormat(), matrices[graph].items()
            file.set_adapter_version(1)
            file.set_model_version(1)
            file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(matrix.numpy()) for name, matrix in values})
            file.export_adapter(str(native))
    return certificates


def empty_tensors(layout: SwappableLayout, graph: str) -> dict[str, Tensor]:
    """Return matrices of rank 0 for every LoRA input of a graph, by input."""
    dtype = getattr(torch, DTYPES[layout.dtype])
    return {
        place.input: torch.zeros((place.features, 0) if site.endswith("lora_A") else (0, place.features), dtype=dtype)
        for site, place in layout.places.items()
        if place.graph == graph
    }


def lora_feed(graph: Path, adapter: Path | None) -> dict[str, Tensor]:
    """Return what a graph needs in its required LoRA inputs; nothing if they have defaults."""
    if not (graph.parent / LAYOUT_FILE).is_file():
        return {}
    layout = read_json(graph.parent / LAYOUT_FILE, SwappableLayout)
    if not layout.web:
        return {}
    if adapter is None:
        return empty_tensors(layout, graph.name)
    with open_tensors(adapter) as file:
        return {name: file.read(name) for name in file.keys}
