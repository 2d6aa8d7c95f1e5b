"""Engines in this process that answer with vectors, classes or scores: PyTorch with PEFT, and ONNX Runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.common.errors import CheckpointError, ConfigError, EngineError
from loraover.common.request import as_written
from loraover_serve.engines.base import engine_errors
from loraover_serve.engines.installed import installed_version
from loraover_serve.engines.onnx import OnnxArm
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.vectors.asking import VectorAnswer, VectorAnswers, checked_numbers
from loraover_serve.verify.vector_models import Reading, VectorRunner, pooled

Inputs = Sequence[Mapping[str, Tensor]]

GRAPHS = ("model.onnx", "onnx/model.onnx")
"""Places of a graph in a folder: ours, and that of sentence-transformers."""
STATES = ("last_hidden_state", "token_embeddings")
"""Outputs with a hidden state for each token."""
VECTOR = "sentence_embedding"
"""Output with the vector of a text, which the graph pools itself."""

PADDING = "padding: the graph was given one text at a time"
POOLED_HERE = "pooling, length of vectors and prefix: they were applied here, and not by the graph"


class VectorEngine(ABC):
    """A running engine with a base model and an adapter, or with the adapter alone."""

    name: str
    distributions: ClassVar[tuple[str, ...]]
    has_base = True
    not_checked: tuple[str, ...] = ()

    @abstractmethod
    def rows(self, arm: str, inputs: Inputs) -> list[NDArray[np.float64]]:
        """Return the answer to each text as a server would give it: a vector, or logits.

        Raises:
            EngineError: An engine that fails, or that gives something else.
        """

    @classmethod
    def installed(cls) -> str | None:
        """Version that is installed; None if it is missing."""
        return installed_version(cls.distributions)

    def answers(self, inputs: Inputs) -> VectorAnswers:
        """Answers of both models to texts.

        Args:
            inputs: Tokens of the texts, with masks.

        Raises:
            EngineError: An engine that fails, or whose answers are not finite numbers.
        """
        found = {
            arm: dict(enumerate(map(self._answer, self.rows(arm, inputs))))
            for arm in ((BASE, ADAPTER) if self.has_base else (ADAPTER,))
        }
        rounds = [{place: (said, dict[str, str]()) for place, said in found[ADAPTER].items()}]
        return VectorAnswers(self.name, found.get(BASE, {}), rounds, is_one_model=not self.has_base, is_here=True)

    def _answer(self, row: NDArray[np.float64]) -> VectorAnswer:
        try:
            return VectorAnswer(checked_numbers(row.tolist()))
        except ValueError as error:
            raise EngineError(
                f"{self.name}: an answer cannot be read, since {error}; a model in fp16 may overflow: run one in fp32."
            ) from error


@final
class TorchVectors(VectorEngine):
    """PyTorch with PEFT, which gets the files of the adapter as they are.

    Args:
        runner: The base model, into which PEFT puts the adapter.
    """

    name = "torch"
    distributions = ("peft",)

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
        return [_normalised(row, self._reading) for row in found[self._reading.pooling or self._reading.task]]


@final
class GraphVectors(VectorEngine):
    """ONNX Runtime, one text after the other.

    Args:
        arms: Graph and adapter of each arm; the base model is missing if there is only a merged graph.
        reading: How the graph's outputs become vectors.

    Raises:
        EngineError: A graph without an output that is known.
    """

    name = "onnx"
    distributions = ("onnxruntime", "onnxruntime-gpu")

    def __init__(self, arms: Mapping[str, OnnxArm], reading: Reading) -> None:
        from loraover_export.formats.onnx.kinds.base import GraphSession

        self.has_base, self._reading = BASE in arms, reading
        self._sessions = {arm: GraphSession(_graph_in(each.graph), "cpu", each.adapter) for arm, each in arms.items()}
        outputs = self._sessions[ADAPTER].outputs
        names = (VECTOR, *STATES) if reading.task == "embed" else ("logits",)
        found = [name for name in names if name in outputs]
        if not found:
            shown = ", ".join(outputs)
            raise EngineError(f"onnx: the graph has the outputs {shown:.200}, expected {' or '.join(names)}.")
        self._output = found[0]
        self.not_checked = (PADDING, POOLED_HERE) if self._output in STATES else (PADDING,)

    def rows(self, arm: str, inputs: Inputs) -> list[NDArray[np.float64]]:
        with engine_errors(self.name):
            return [self._row(self._sessions[arm], each) for each in inputs]

    def _row(self, session: Any, inputs: Mapping[str, Tensor]) -> NDArray[np.float64]:
        ids = inputs["input_ids"]
        known = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        known |= {"position_ids": torch.arange(ids.shape[1])[None]} | session.empty_cache(1)
        found = session.run({**known, **inputs}, (self._output,))[self._output][0].double()
        if self._output not in STATES:
            return np.asarray(found.flatten().numpy())
        return _normalised(pooled(found)[str(self._reading.pooling)].flatten().numpy(), self._reading)


def _normalised(row: NDArray[np.float64], reading: Reading) -> NDArray[np.float64]:
    """A vector that was pooled here, with the length 1 if the reading says so."""
    return row / (np.linalg.norm(row) or 1.0) if reading.is_normalised else row


def _graph_in(folder: Path) -> Path:
    found = next((folder / name for name in GRAPHS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder}: has no {' or '.join(GRAPHS)}; name the folder of an ONNX export.")
    return found


def exported_arms(folder: Path, adapter_name: str, served_name: str | None = None) -> dict[str, OnnxArm]:
    """Arms of an ONNX export, merged or swappable, or of a graph that another tool wrote.

    Args:
        folder: Folder of the export.
        adapter_name: Name of the adapter, which its file beside the graph has; the only file may have another one.
        served_name: Name of the adapter's file in place of that; None if the user gave none.

    Raises:
        CheckpointError: No graph in the folder.
        ConfigError: No adapter of that name beside the graph.
    """
    from loraover_export.formats.onnx.report import LAYOUT_FILE

    # Beside a graph that has no LoRA inputs of ours, a safetensors file may hold the weights of a model.
    is_ours = (folder / LAYOUT_FILE).is_file()
    places = dict.fromkeys((folder, _graph_in(folder).parent))
    endings = ("onnx_adapter", "safetensors") if is_ours else ("onnx_adapter",)
    beside = {path.stem: path for ending in endings for place in places for path in place.glob(f"*.{ending}")}
    if served_name is None and not beside and not is_ours:
        return {ADAPTER: OnnxArm(folder)}
    is_alone = served_name is None and len(beside) == 1
    file = next(iter(beside.values())) if is_alone else beside.get(served_name or adapter_name)
    if file is None:
        shown = ", ".join(sorted(beside)) or "none"
        raise ConfigError(
            f"{folder}: beside the graph are the adapters {shown}, expected {served_name or adapter_name}; choose with "
            f"{as_written('served_name')}, and leave it out for a graph that has the adapter in its weights."
        )
    return {BASE: OnnxArm(folder), ADAPTER: OnnxArm(folder, file)}
