"""Sizes of Llama models, from a tiny one to 70B parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

Shapes = Mapping[str, tuple[int, int]]
"""Output and input width of each linear layer of one layer, by its name."""


@dataclass(frozen=True)
class Llama:
    """Sizes of one model.

    Args:
        layers: Number of layers.
        hidden: Width of the residual stream, and of all queries together.
        values: Width of all keys together, and of all values.
        intermediate: Width inside the feed-forward network.
        head: Width of one head's queries.
        vocabulary: Number of tokens.
        is_tied: Whether the output layer is the embedding.
    """

    layers: int
    hidden: int
    values: int
    intermediate: int
    head: int = 128
    vocabulary: int = 128256
    is_tied: bool = False

    @property
    def linears(self) -> Shapes:
        """Output and input width of each linear layer of one layer."""
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.values, self.hidden),
            "self_attn.v_proj": (self.values, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def pairs(self, rank: int, draw: torch.Generator, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
        """Draw A and B for every linear layer of every layer, by the path of its module."""
        return {
            f"model.layers.{layer}.{path}": (_drawn(draw, dtype, rank, n), _drawn(draw, dtype, m, rank))
            for layer in range(self.layers)
            for path, (m, n) in self.linears.items()
        }

    def config(self) -> LlamaConfig:
        """Return transformers' configuration of such a model."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // self.head,
            num_key_value_heads=self.values // self.head,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.is_tied,
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
        )

    def random_model(self, device: torch.device) -> Any:
        """Make such a model in bfloat16 with random weights, which are drawn on the device."""
        torch.manual_seed(0)
        with device:
            return LlamaForCausalLM._from_config(self.config(), dtype=torch.bfloat16)


def _drawn(draw: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw).mul_(0.02).to(dtype)


MODELS = {
    "SmolLM2-135M": Llama(30, hidden=576, values=192, intermediate=1536, head=64, vocabulary=49152, is_tied=True),
    "Llama-3.2-1B": Llama(layers=16, hidden=2048, values=512, intermediate=8192, head=64, is_tied=True),
    "Llama-3.2-3B": Llama(layers=28, hidden=3072, values=1024, intermediate=8192, is_tied=True),
    "Llama-3.1-8B": Llama(layers=32, hidden=4096, values=1024, intermediate=14336),
    "Llama-3.1-70B": Llama(layers=80, hidden=8192, values=1024, intermediate=28672),
}
"""Models that were published."""
TINY = Llama(layers=2, hidden=64, values=32, intermediate=96, head=32, vocabulary=72)
SIZES = {"tiny": TINY, **MODELS}
