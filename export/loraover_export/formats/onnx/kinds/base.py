"""The interface of a kind of model: write its graphs, and run them and the PyTorch model on the same tokens.

A graph runs in a `GraphSession` of ONNX Runtime.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnxruntime as ort
import torch
from torch import Tensor

from loraover.common.errors import ExportError
from loraover_export.formats.onnx.swappable import lora_feed

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
FLOATS = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
TYPES = FLOATS | {"tensor(int32)": torch.int32, "tensor(int64)": torch.int64, "tensor(bool)": torch.bool}
GraphRunner = Callable[["ComparedTokens"], Tensor]
"""Function from `ComparedTokens` to their logits: (batch, tokens, vocabulary), or (batch, labels)."""


@dataclass(frozen=True)
class ComparedTokens:
    """Tokens to compare outputs on.

    Args:
        ids: Token ids, (batch, past + sequence), int64.
        past: Number of tokens that go through the cache first.
        padding: Side on which row i is padded by i tokens, within the tokens that go through the cache first.
    """

    ids: Tensor
    past: int = 0
    padding: Literal["none", "left", "right"] = "none"

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.ids.shape[0]

    @property
    def sequence(self) -> int:
        """Number of tokens in a row after those that go through the cache first."""
        return self.ids.shape[1] - self.past

    @property
    def mask(self) -> Tensor:
        """Ones for real tokens and zeros for padding, (batch, past + sequence), int64."""
        mask = torch.ones_like(self.ids)
        end = self.past or self.ids.shape[1]
        for row in range(self.batch):
            if self.padding == "left":
                mask[row, :row] = 0
            elif self.padding == "right":
                mask[row, end - row : end] = 0
        return mask

    @property
    def name(self) -> str:
        """Shape and padding, in words."""
        padded = "" if self.padding == "none" else f", padded on the {self.padding}"
        return f"batch {self.batch}, sequence {self.sequence}, past {self.past}{padded}"


@dataclass(frozen=True)
class GraphPlan:
    """Settings of a graph.

    Args:
        precision: Precision of the weights: fp32, fp16 or int4.
        device: Cpu or cuda.
        markers: Random matrices that stand for A and B in a swappable graph, by name; None for a merged graph.
        rank: Rank of the markers.
    """

    precision: str
    device: str
    markers: Mapping[str, Tensor] | None = None
    rank: int = 1


class GraphKind(ABC):
    """A kind of model; arguments called `model` are transformers models in eval mode."""

    graphs: tuple[str, ...]
    """File names of the graphs."""
    compared_as: ClassVar[Literal["logits", "states"]] = "logits"
    """Outputs that are compared: logits, or hidden states."""

    def prepared(self) -> AbstractContextManager[object]:
        """Return a context that starts a slow exporter early, before `export` needs it."""
        return nullcontext()

    @abstractmethod
    def export(self, model: Any, tokenizer: Any, plan: GraphPlan, work: Path, out: Path) -> None:
        """Write the graphs, with configuration and tokenizer.

        Args:
            model: The model to export.
            tokenizer: The model's tokenizer.
            plan: Settings of the graphs.
            work: An empty folder for temporary files.
            out: Folder for the graphs.

        Raises:
            ExportError: The exporter does not support this model.
        """

    def cases(self, rows: Tensor) -> list[ComparedTokens]:
        """Return the cases to check, cut from three rows of twelve tokens; this class returns those without a cache."""
        return [
            ComparedTokens(rows[:1, :7]),
            ComparedTokens(rows),
            ComparedTokens(rows, padding="left"),
            ComparedTokens(rows, padding="right"),
        ]

    @abstractmethod
    def reference(self, model: Any, case: ComparedTokens) -> Tensor:
        """Return PyTorch's logits of the case's last `sequence` positions, without a cache."""

    @abstractmethod
    def runner(self, folder: Path, device: str, adapter: Path | None) -> GraphRunner:
        """Return a function that gives ONNX Runtime's logits of the same positions, through a cache if there is one.

        Args:
            folder: Folder of the graphs.
            device: Cpu or cuda.
            adapter: Path of the adapter's files without their endings; see `swappable.adapter_file`.
        """

    def compared(self, case: ComparedTokens, logits: Tensor) -> Tensor:
        """Return the logits to compare, (positions, vocabulary), without those of padding."""
        if logits.ndim == 2:
            return logits
        return logits[case.mask[:, case.past :].bool()]

    def generate_reference(self, model: Any, prompt: Tensor, tokens: int) -> tuple[Tensor, Tensor] | None:
        """Decode greedily in PyTorch after a prompt (1, length), up to the end of the text; None if this kind cannot.

        Returns:
            Tokens (t,) without the one that ends the text, and the logits before each token and before that one:
            (t, vocabulary) or (t + 1, vocabulary).
        """
        return None

    def generate(self, folder: Path, prompt: Tensor, tokens: int, device: str, adapter: Path | None) -> Tensor | None:
        """Decode greedily in ONNX Runtime, through its cache, without the token that ends the text: tokens (t,)."""
        return None


def greedy(model: Any, prompt: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Decode greedily with transformers, without the other settings of the model's generation configuration."""
    from transformers import GenerationConfig

    settings = model.generation_config
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=settings.eos_token_id,
            pad_token_id=0,
            decoder_start_token_id=settings.decoder_start_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        ),
    )
    logits = torch.cat(output.logits)
    chosen = output.sequences[0, -len(logits) :]
    ends = torch.tensor(settings.eos_token_id if settings.eos_token_id is not None else [], device=chosen.device)
    return chosen[~torch.isin(chosen, ends)], logits


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
        self.outputs = tuple(o.name for o in self._session.get_outputs())

    def run(self, feed: Mapping[str, Tensor], wanted: Sequence[str] = ()) -> dict[str, Tensor]:
        """Run the graph and return its outputs by name.

        Args:
            feed: Inputs, of which those that the graph lacks are left out; the others get its data types.
            wanted: Names of the outputs; none means all.

        Raises:
            ExportError: ONNX Runtime refuses the inputs.
        """
        options = ort.RunOptions()
        if self._adapter is not None:
            options.add_active_adapter(self._adapter)
        arrays = {}
        for name in feed.keys() & self.inputs.keys():
            arrays[name] = feed[name].to(TYPES.get(self.inputs[name].type, feed[name].dtype)).numpy()
        names = list(wanted or self.outputs)
        try:
            outputs = self._session.run(names, arrays | self._lora, options)
        except Exception as error:  # as above
            raise ExportError(f"ONNX Runtime cannot run the graph: {error}") from error
        return {name: torch.from_numpy(value) for name, value in zip(names, outputs, strict=True)}

    def empty_cache(self, batch: int, head_size: int = 0) -> dict[str, Tensor]:
        """Return an empty KV cache; `head_size` is used where the graph leaves it free."""
        empty = {}
        for name, value in self.inputs.items():
            if name.startswith("past_key_values."):
                _, heads, _, size = value.shape
                size = size if isinstance(size, int) else head_size
                empty[name] = torch.zeros((batch, heads, 0, size), dtype=FLOATS[value.type])
        return empty
