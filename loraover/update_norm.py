"""The size of what a LoRA adapter changes."""

from __future__ import annotations

import math

import torch
from torch import nn

from loraover.sites import lora_layers


@torch.no_grad()
def update_norm(model: nn.Module, adapter: str = "default") -> float:
    """Frobenius norm of delta_W = scaling * B @ A over all adapted modules; 0 for a fresh LoRA.

    It costs r x r products: ||B A||^2 = trace((B^T B)(A A^T)), in float64.
    """
    total = 0.0
    for layer in lora_layers(model).values():
        if adapter in layer.lora_A:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        elif adapter in layer.lora_embedding_A:
            a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        else:
            continue
        a, b = a.double(), b.double()
        total += float(layer.scaling[adapter] ** 2 * ((b.mT @ b) * (a @ a.mT)).sum())
    return math.sqrt(max(total, 0.0))
