"""ONNX Runtime sessions, run with or without an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from loraover.common.errors import ExportError
from loraover_export.formats.onnx.swappable import lora_feed

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
FLOATS = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


def has_provider(device: str) -> bool:
    """Whether this machine's ONNX Runtime can run on the device."""
    return PROVIDERS[device] in ort.get_available_providers()


class GraphSession:
    """Graph in ONNX Runtime.

    Args:
        graph: Path of the graph.
        device: Cpu or cuda; a graph for CUDA runs on the CPU if ONNX Runtime has no CUDA provider.
        adapter: An adapter's file for this graph; None runs without.

    Raises:
        ExportError: ONNX Runtime cannot load the graph or the adapter.
    """

    def __init__(self, graph: Path, device: str, adapter: Path | None = None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # a lower level shows a warning for each input that has a default
        providers = list(dict.fromkeys(PROVIDERS[d] for d in (device, "cpu") if has_provider(d)))
        try:
            self._session = ort.InferenceSession(str(graph), options, providers=providers)
            self._lora = {name: tensor.numpy() for name, tensor in lora_feed(graph, adapter).items()}
            self._adapter = None if adapter is None or self._lora else ort.LoraAdapter()
            if self._adapter is not None:
                self._adapter.Load(str(adapter))
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise ExportError(f"{graph}: ONNX Runtime cannot load it: {error}") from error
        self.inputs: dict[str, Any] = {i.name: i for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs()]

    def run(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph and return its outputs by name; inputs that the graph lacks are left out.

        Raises:
            ExportError: ONNX Runtime refuses the inputs.
        """
        options = ort.RunOptions()
        if self._adapter is not None:
            options.add_active_adapter(self._adapter)
        arrays = {name: tensor.numpy() for name, tensor in feed.items() if name in self.inputs}
        arrays |= self._lora
        try:
            outputs = self._session.run(self._outputs, arrays, options)
        except Exception as error:  # as above
            raise ExportError(f"ONNX Runtime cannot run the graph: {error}") from error
        return {name: torch.from_numpy(value) for name, value in zip(self._outputs, outputs, strict=True)}

    def empty_cache(self, batch: int, head_size: int = 0) -> dict[str, Tensor]:
        """Return an empty KV cache; `head_size` is used where the graph leaves it free."""
        empty = {}
        for name, value in self.inputs.items():
            if name.startswith("past_key_values."):
                _, heads, _, size = value.shape
                size = size if isinstance(size, int) else head_size
                empty[name] = torch.zeros((batch, heads, 0, size), dtype=FLOATS[value.type])
        return empty
