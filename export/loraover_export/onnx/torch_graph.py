"""Graphs by torch's own exporter, with LoRA branches that can become inputs."""

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
    """W x + B(A(x)) with A (in_features, r) and B (r, out_features), laid out as the graph multiplies by them."""

    def __init__(self, base_layer: nn.Module, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Parameter(a.mT.contiguous())
        self.lora_B = nn.Parameter(b.mT.contiguous())

    @property
    def weight(self) -> Tensor:
        """Of the base layer: T5 reads the dtype of a weight."""
        return self.base_layer.get_parameter("weight")

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base_layer(x) + (x @ self.lora_A) @ self.lora_B
        return output


def set_precision(model: nn.Module, precision: str) -> None:
    """Cast a model to the precision of its graph.

    Raises:
        ExportError: int4, which onnxruntime-genai's builder makes of decoders only.
    """
    if precision == "int4":
        raise ExportError(f"int4 is made for decoder graphs only; {type(model).__name__} takes fp32 or fp16.")
    if precision == "fp16":
        model.half()


def add_branches(model: nn.Module, markers: Mapping[str, Tensor]) -> None:
    """Put a branch with the markers beside every adapted layer.

    Mutates: `model`.
    """
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
    """Export a module whose arguments and results are plain tensors.

    Args:
        inputs: name, example and names of the free dimensions of each argument; an example's free
            dimensions must be 2 at least, and differ where they may.
        outputs: names.
        graph: file to write; weights go beside it.

    Raises:
        ExportError: torch cannot trace the model.
    """
    from torch.onnx import OnnxExporterError

    names, examples, free = zip(*inputs, strict=True)
    dims: dict[str, Any] = {}
    shapes = tuple({i: dims.setdefault(d, torch.export.Dim(d)) for i, d in dim.items()} for dim in free)
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
                dynamic_shapes=(shapes,) if _variadic(module) else shapes,
                opset_version=OPSET,
                verbose=False,
            )
    except (OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(f"torch.onnx.export cannot trace {type(module).__name__}: {first}") from error
    assert program is not None
    program.save(graph, external_data=True)


def _variadic(module: nn.Module) -> bool:
    """Whether forward takes its tensors as *arguments, which torch.export sees as one tuple."""
    return bool(module.forward.__code__.co_flags & 0x04)
