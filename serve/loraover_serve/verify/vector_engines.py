"""Engines in this process that answer with vectors, classes or scores: PyTorch with PEFT, and ONNX Runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.common.errors import CheckpointError, ConfigError, EngineError
from loraover.common.request import as_written
from loraover_serve.engines.base import engine_errors
from loraover_serve.engines.onnx import OnnxArm
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.vectors.asking import VectorAnswer, VectorAnswers
from loraover_serve.judge.vectors.reference import VectorReference
from loraover_serve.verify.vector_models import Reading, VectorRunner, pooled

Inputs = Sequence[Mapping[str, Tensor]]

GRAPHS = ("model.onnx", "onnx/model.onnx")
"""Places of a graph in a folder: ours, and that of sentence-transformers."""
STATES = ("last_hidden_state", "token_embeddings")
"""Outputs with a hidden state for each token."""
VECTOR = "sentence_embedding"
"""Output with the vector of a text, which the graph pools itself."""


class VectorEngine(ABC):
    """A running engine with a base model and an adapter, or with the adapter alone."""

    name: str
    has_base = True

    @abstractmethod
    def rows(self, arm: str, inputs: Inputs) -> list[NDArray[np.float64]]:
        """Return a vector, or logits, of each text.

        Raises:
            EngineError: An engine that fails, or that gives something else.
        """

    def answers(self, reference: VectorReference, inputs: Inputs) -> VectorAnswers:
        """Answers of both models to the texts of a reference, as a server would give them.

        Args:
            inputs: Tokens of the texts, with masks.
        """
        found = {
            arm: {
                place: VectorAnswer(reference.answer(row.tolist())) for place, row in enumerate(self.rows(arm, inputs))
            }
            for arm in ((BASE, ADAPTER) if self.has_base else (ADAPTER,))
        }
        rounds = [{place: (said, dict[str, str]()) for place, said in found[ADAPTER].items()}]
        return VectorAnswers(self.name, found.get(BASE, {}), rounds, is_one_model=not self.has_base, is_here=True)


@final
class TorchVectors(VectorEngine):
    """PyTorch with PEFT, which gets the files of the adapter as they are.

    Args:
        runner: The base model, into which PEFT puts the adapter.
    """

    name = "torch"

    def __init__(self, runner: VectorRunner, adapter: AdapterDir, reading: Reading) -> None:
        from peft import PeftModel

        self._runner, self._reading = runner, reading
        with engine_errors(self.name):
            on = str(runner.model.device)
            self._model = PeftModel.from_pretrained(runner.model, str(adapter.path), torch_device=on)
            self._model.eval()

    def rows(self, arm: str, inputs: Inputs) -> list[NDArray[np.float64]]:
        with engine_errors(self.name):
            if arm == ADAPTER:
                found = self._runner.rows(self._model, inputs, self._reading)
            else:
                with self._model.disable_adapter():
                    found = self._runner.rows(self._model, inputs, self._reading)
        return found[self._reading.pooling or self._reading.task]


@final
class GraphVectors(VectorEngine):
    """ONNX Runtime, one text after the other.

    Args:
        arms: Graph and adapter of each arm; the base model is missing if there is only a merged graph.
        reading: How the graph's outputs become vectors.
    """

    name = "onnx"

    def __init__(self, arms: Mapping[str, OnnxArm], reading: Reading) -> None:
        from loraover_export.formats.onnx.kinds.base import GraphSession

        self.has_base, self._reading = BASE in arms, reading
        self._sessions = {arm: GraphSession(_graph_in(each.graph), "cpu", each.adapter) for arm, each in arms.items()}

    def rows(self, arm: str, inputs: Inputs) -> list[NDArray[np.float64]]:
        return [self._row(self._sessions[arm], each).double().numpy() for each in inputs]

    def _row(self, session: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        ids = inputs["input_ids"]
        known = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        known["position_ids"] = torch.arange(ids.shape[1])[None]
        outputs = session.run({**known, **inputs})
        if self._reading.task != "embed":
            return self._output(outputs, ("logits",))[0].flatten()
        found = self._output(outputs, (VECTOR, *STATES))[0]
        return found if found.ndim == 1 else pooled(found)[str(self._reading.pooling)]

    def _output(self, outputs: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        for name in names:
            if name in outputs:
                return outputs[name].float()
        shown = ", ".join(outputs)
        raise EngineError(f"onnx: the graph has the outputs {shown:.200}, expected {' or '.join(names)}.")


def _graph_in(folder: Path) -> Path:
    found = next((folder / name for name in GRAPHS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder}: has no {' or '.join(GRAPHS)}; name the folder of an ONNX export.")
    return found


def exported_arms(folder: Path, name: str) -> dict[str, OnnxArm]:
    """Arms of an ONNX export, merged or swappable, or of a graph that another tool wrote.

    Args:
        folder: Folder of the export.
        name: Name of the adapter's file beside a swappable graph; the only file there may have another name.

    Raises:
        CheckpointError: No graph in the folder.
        ConfigError: Adapters beside a swappable graph, none of which has the name.
    """
    from loraover_export.formats.onnx.report import LAYOUT_FILE

    _graph_in(folder)
    if not (folder / LAYOUT_FILE).is_file():
        return {ADAPTER: OnnxArm(folder)}
    beside = {path.stem: path for ending in ("onnx_adapter", "safetensors") for path in folder.glob(f"*.{ending}")}
    file = next(iter(beside.values())) if len(beside) == 1 else beside.get(name)
    if file is None:
        shown = ", ".join(sorted(beside)) or "none"
        raise ConfigError(
            f"{folder}: beside the swappable graph are the adapters {shown}, expected {name}; choose with "
            f"{as_written('served_name')}."
        )
    return {BASE: OnnxArm(folder), ADAPTER: OnnxArm(folder, file)}
