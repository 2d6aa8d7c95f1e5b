"""Graphs from torch.onnx, with LoRA branches that can become inputs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraover.common.errors import ExportError

OPSET = 20


class LoraBranch(nn.Module):
    """A layer W x + B(A(x)) whose A (in_features, r) and B (r, out_features) are stored as the graph multiplies."""

    def __init__(self, base_layer: nn.Module, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Parameter(a.mT.contiguous())
        self.lora_B = nn.Parameter(b.mT.contiguous())

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, whose dtype T5 reads."""
        return self.base_layer.get_parameter("weight")

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base_layer(x) + (x @ self.lora_A) @ self.lora_B
        return output


def set_precision(model: nn.Module, precision: str) -> None:
    """Cast a model to the precision of its graph."""
    if precision == "int4":
        raise ExportError(f"int4 exists for decoder graphs only; {type(model).__name__} takes fp32 or fp16.")
    if precision == "fp16":
        model.half()


def add_branches(model: nn.Module, markers: Mapping[str, Tensor]) -> None:
    """Replace every adapted layer of `model` by one with a LoRA branch that holds the markers."""
    for name, a in markers.items():
        module, _, matrix = name.rpartition(".")
        if matrix == "lora_A":
            layer = model.get_submodule(module)
            dtype = next(layer.parameters()).dtype
            branch = LoraBranch(layer, a.to(dtype), markers[f"{module}.lora_B"].to(dtype))
            model.set_submodule(module, branch)


def export_torch(
    module: nn.Module,
    inputs: Sequence[tuple[str, Tensor, Mapping[int, str]]],
    outputs: Sequence[str],
    graph: Path,
) -> None:
    """Export a module whose arguments and results are plain tensors, as a graph with its weights beside it.

    The free dimensions of an example must be at least 2, and those that may differ must differ.
    """
    from torch.onnx import OnnxExporterError

    names, examples, free = zip(*inputs, strict=True)
    dims: dict[str, Any] = {}
    shapes = tuple({i: dims.setdefault(d, torch.export.Dim(d)) for i, d in dim.items()} for dim in free)
    is_variadic = bool(module.forward.__code__.co_flags & 0x04)  # torch.export treats *arguments as one tuple
    for noisy in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                examples,
                dynamo=True,
                input_names=list(names),
                output_names=list(outputs),
                dynamic_shapes=(shapes,) if is_variadic else shapes,
                opset_version=OPSET,
                verbose=False,
            )
    except (OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(f"torch.onnx.export cannot trace {type(module).__name__}: {first}") from error
    assert program is not None
    program.save(graph, external_data=True)
