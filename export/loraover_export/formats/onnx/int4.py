"""Rounding of an int4 graph, repeated in PyTorch: its effect on logits is the noise of such a graph."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from loraover.checkpoint.peft_adapter import AdapterDir
from loraover_export.merge.in_memory import merge

BLOCK = 32  # neighbouring elements of a row that share a scale
WEIGHT_LEVELS, ACTIVATION_LEVELS = 8, 127  # largest magnitudes of 4 and 8 bits


@torch.no_grad()
def rounded_copy(model: Any, merged: AdapterDir | None) -> Any:
    """Return a copy of the model that rounds as onnxruntime-genai's int4 graphs for a CPU do.

    In every linear layer, blocks of 32 weights are rounded to 4 bits and blocks of 32 activations to 8 bits, with a
    scale for each block. On a 2-layer Llama with either kind of graph, ONNX Runtime's logits differ from PyTorch's by
    as much as those of this copy, within 10 %.

    Args:
        model: A transformers model in float32; it is not changed.
        merged: Adapter to merge before the rounding, as in a merged graph; None merges nothing.

    Source: ONNX Runtime 1.32, contrib operator MatMulNBits with symmetric blocks and accuracy level 4.
    """
    rounded = copy.deepcopy(model)
    if merged is not None:
        merge(rounded, merged)
    for module in rounded.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(round_weights(module.weight), requires_grad=False)
            module.register_forward_pre_hook(lambda module, args: (round_activations(args[0]), *args[1:]))
    return rounded


def round_weights(weights: Tensor) -> Tensor:
    """Round each block of weights (out, in) to -8 ... 7 times a scale; its largest element becomes -8 times that."""
    blocks = _blocks(weights)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = _without_zero(-largest / WEIGHT_LEVELS)
    levels = (blocks / scale).round().clamp(-WEIGHT_LEVELS, WEIGHT_LEVELS - 1)
    return (levels * scale).flatten(-2)[..., : weights.shape[-1]].contiguous()


def round_activations(x: Tensor) -> Tensor:
    """Round each block of activations (..., in) to -127 ... 127 times a scale."""
    blocks = _blocks(x)
    scale = _without_zero(blocks.abs().amax(-1, keepdim=True) / ACTIVATION_LEVELS)
    return ((blocks / scale).round() * scale).flatten(-2)[..., : x.shape[-1]]


def _blocks(x: Tensor) -> Tensor:
    """Reshape (..., in) to (..., blocks, BLOCK), padded with zeros."""
    return nn.functional.pad(x, (0, -x.shape[-1] % BLOCK)).reshape(*x.shape[:-1], -1, BLOCK)


def _without_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)
