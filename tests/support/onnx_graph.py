"""Exported decoder graphs in plain ONNX Runtime and onnxruntime-genai, and PyTorch's answers; nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import onnxruntime_genai as og
import torch
from torch import Tensor

LENGTH = 12
UNIT = 2.0**-24


def fp32_tolerance(logits: Tensor) -> float:
    """64 roundings of the largest logit: some dozens of operations lie between tokens and logits, in two orders.

    An adapter of these tests moves logits by 10^4 times as much.
    """
    return 64 * UNIT * float(logits.abs().max())


@dataclass(frozen=True)
class Feed:
    """A batch, and how it goes through the graph.

    Args:
        steps: Tokens of each call; they sum to LENGTH.
        padding: In row k so many tokens of the first call as `pads[k]` says.
    """

    rows: int
    steps: Sequence[int] = (LENGTH,)
    padding: Literal["none", "left", "right"] = "none"
    pads: Sequence[int] = (0, 3, 1, 5)
    seed: int = 0

    @property
    def ids(self) -> Tensor:
        return torch.randint(3, 64, (self.rows, LENGTH), generator=torch.Generator().manual_seed(self.seed))

    @property
    def mask(self) -> Tensor:
        """(rows, LENGTH), ones for real tokens."""
        mask, first = torch.ones(self.rows, LENGTH, dtype=torch.int64), self.steps[0]
        for row, pad in zip(mask, self.pads, strict=False):
            if self.padding == "left":
                row[:pad] = 0
            elif self.padding == "right":
                row[first - pad : first] = 0
        return mask

    @property
    def positions(self) -> Tensor:
        return (self.mask.cumsum(-1) - 1).clamp_min(0)

    def real(self, logits: Tensor) -> Tensor:
        """Logits of the real tokens, (tokens, vocabulary)."""
        return logits[self.mask.bool()]


FEEDS = {
    "one row": Feed(1),
    "batch": Feed(4),
    "padded on the left": Feed(4, padding="left"),
    "one real token": Feed(2, padding="left", pads=(0, 11)),
    "padded on the right": Feed(4, padding="right"),
    "token by token": Feed(1, steps=(1,) * LENGTH),
    "a longer second step": Feed(1, steps=(7, 5)),
    "cached batch": Feed(4, steps=(8, 1, 1, 1, 1)),
    "cached, padded on the left": Feed(4, steps=(8, 1, 1, 1, 1), padding="left"),
    "cached, padded on the right": Feed(4, steps=(8, 1, 1, 1, 1), padding="right"),
}


@torch.no_grad()
def torch_logits(model: Any, feed: Feed) -> Tensor:
    """PyTorch's logits of the real tokens, without a cache."""
    output = model(input_ids=feed.ids, attention_mask=feed.mask, position_ids=feed.positions, use_cache=False)
    return feed.real(output.logits)


class Graph:
    """One graph file in a session, with an adapter or without."""

    def __init__(self, file: Path, adapter: Path | None = None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]
        self._options, self._adapter = ort.RunOptions(), ort.LoraAdapter()
        if adapter is not None:
            self._adapter.Load(str(adapter))
            self._options.add_active_adapter(self._adapter)

    def run(self, feed: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name; inputs that the graph does not have are left out."""
        inputs = {value.name for value in self.session.get_inputs()}
        known = {name: array for name, array in feed.items() if name in inputs}
        return dict(zip(self.names, self.session.run(self.names, known, self._options), strict=True))

    def empty_cache(self, rows: int, head_size: int) -> dict[str, npt.NDArray[Any]]:
        """Keys and values of no tokens."""
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {
            value.name: np.zeros((rows, value.shape[1], 0, head_size), dtypes[value.type])
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def logits(self, feed: Feed, head_size: int = 32) -> Tensor:
        """Logits of the real tokens, each call's cache handed to the next."""
        cache, logits, start = self.empty_cache(feed.rows, head_size), [], 0
        for tokens in feed.steps:
            end = start + tokens
            outputs = self.run(
                {
                    "input_ids": feed.ids[:, start:end].numpy(),
                    "attention_mask": feed.mask[:, :end].numpy(),
                    "position_ids": feed.positions[:, start:end].numpy(),
                    "token_type_ids": np.zeros((feed.rows, end - start), np.int64),
                }
                | cache
            )
            cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
            logits.append(torch.from_numpy(outputs["logits"]).float())
            start = end
        return feed.real(torch.cat(logits, dim=1))


def worst_error(graph: Graph, model: Any, feeds: Sequence[str] = tuple(FEEDS)) -> dict[str, float]:
    """Largest difference to PyTorch of each feed, in tolerances of fp32."""
    worst = {}
    for name in feeds:
        expected = torch_logits(model, FEEDS[name])
        error = (graph.logits(FEEDS[name]) - expected).abs().max()
        worst[name] = float(error) / fp32_tolerance(expected)
    return worst


def genai_tokens(folder: Path, prompt: Tensor, tokens: int, adapter: Path | None = None) -> list[int]:
    """Greedy tokens after a prompt (1, length) by onnxruntime-genai."""
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=prompt.shape[1] + tokens, do_sample=False)
    generator = og.Generator(model, parameters)
    if adapter is not None:
        adapters = og.Adapters(model)
        adapters.load(str(adapter), "chosen")
        generator.set_active_adapter(adapters, "chosen")
    generator.append_tokens(prompt.numpy())
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[prompt.shape[1] :]]


def torch_tokens(model: Any, prompt: Tensor, tokens: int) -> list[int]:
    """Greedy tokens by transformers, without the one that ends the text, as onnxruntime-genai gives them."""
    output = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False
    )
    found = [int(token) for token in output[0, prompt.shape[1] :]]
    return found[:-1] if found[-1] == model.config.eos_token_id else found
