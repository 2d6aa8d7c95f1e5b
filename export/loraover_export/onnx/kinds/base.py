"""What the exporter asks of a kind of model: graphs, and how to run them and the PyTorch model on the same tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

GraphRunner = Callable[["Case"], Tensor]
"""Logits of a case: (batch, tokens, vocabulary), or (batch, labels)."""


@dataclass(frozen=True)
class Case:
    """Tokens to compare outputs on.

    Args:
        ids: (batch, past + sequence) int64.
        past: how many of them go through the cache first.
        padding: of the tokens before the cache boundary, by `row` tokens in row `row`.
    """

    ids: Tensor
    past: int = 0
    padding: Literal["none", "left", "right"] = "none"

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    @property
    def sequence(self) -> int:
        return self.ids.shape[1] - self.past

    @property
    def mask(self) -> Tensor:
        """Ones for real tokens, (batch, past + sequence) int64."""
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
        padded = "" if self.padding == "none" else f", padded on the {self.padding}"
        return f"batch {self.batch}, sequence {self.sequence}, past {self.past}{padded}"


@dataclass(frozen=True)
class GraphPlan:
    """What to export.

    Args:
        precision: fp32, fp16 or int4.
        device: cpu or cuda.
        markers: of a swappable graph, by site; None for a plain one.
        rank: of the markers.
    """

    precision: str
    device: str
    markers: Mapping[str, Tensor] | None = None
    rank: int = 1


class GraphKind(ABC):
    """A kind of model. `model` is always a transformers model in eval mode."""

    graphs: tuple[str, ...]
    """File names."""

    @abstractmethod
    def export(self, model: Any, tokenizer: Any, plan: GraphPlan, work: Path, out: Path) -> None:
        """Write the graphs and what their runtime needs into `out`; `work` is an empty folder.

        Raises:
            ExportError: the exporter cannot take this model.
        """

    @abstractmethod
    def cases(self, tokens: Tensor) -> list[Case]:
        """Shapes to check, cut from a stream of tokens."""

    @abstractmethod
    def reference(self, model: Any, case: Case) -> Tensor:
        """PyTorch's logits of the case's last `sequence` positions, without a cache."""

    @abstractmethod
    def runner(self, folder: Path, device: str, adapter: Path | None) -> GraphRunner:
        """ONNX Runtime's logits of the same positions, through the cache where there is one.

        Args:
            folder: holds the graphs.
            adapter: its files, without their endings; see `swappable.adapter_file`.
        """

    def compared(self, case: Case, logits: Tensor) -> Tensor:
        """The rows that mean something, (positions, vocabulary): padding left out."""
        if logits.ndim == 2:
            return logits
        return logits[case.mask[:, case.past :].bool()]

    def generate_reference(self, model: Any, prompt: Tensor, tokens: int) -> tuple[Tensor, Tensor] | None:
        """PyTorch's greedy tokens after a prompt (1, length), up to the end of the text; None where there are none.

        Returns:
            Tokens (t,) without the one that ends the text, and the logits before each token and before that one:
            (t, vocabulary) or (t + 1, vocabulary).
        """
        return None

    def generate(self, folder: Path, prompt: Tensor, tokens: int, device: str, adapter: Path | None) -> Tensor | None:
        """The engine's tokens (t,), through its cache, without the one that ends the text, if any."""
        return None


def greedy(model: Any, prompt: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Greedy decoding by transformers, free of what else a model's generation settings ask for."""
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
        ),
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.cat(output.logits)
    chosen = output.sequences[0, -len(logits) :]
    ends = torch.tensor(settings.eos_token_id if settings.eos_token_id is not None else [])
    return chosen[~torch.isin(chosen, ends)], logits
