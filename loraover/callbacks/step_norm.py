"""The size of what a LoRA adapter changes, and of what a step changes in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraover.overparam.sharding import full
from loraover.overparam.sites import lora_layers


@dataclass(frozen=True)
class Factors:
    """Float64 copies, on the CPU, of A (r, in_features) and B (out_features, r) of a module, and its scaling."""

    a: Tensor
    b: Tensor
    scaling: float

    def square(self) -> float:
        """||scaling * B A||^2 = scaling^2 trace((B^T B)(A A^T)), by r x r products."""
        return self.scaling**2 * float(((self.b.mT @ self.b) * (self.a @ self.a.mT)).sum())


@torch.no_grad()
def factors(model: nn.Module, adapter: str | None = None) -> dict[str, Factors]:
    """Of every module with that adapter, by its path; None: the first that is active."""
    found = {}
    for module, layer in lora_layers(model).items():
        name = layer.active_adapters[0] if adapter is None else adapter
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        elif name in layer.lora_embedding_A:
            a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        else:
            continue
        found[module] = Factors(_copy(a), _copy(b), layer.scaling[name])
    return found


def _copy(parameter: Tensor) -> Tensor:
    return full(parameter.detach()).cpu().to(torch.float64, copy=True)  # an Apple GPU has no float64


def step_norm(before: Mapping[str, Factors], after: Mapping[str, Factors]) -> float:
    """Frobenius norm of the change of scaling * B A over all modules: B' A' - B A = [B', -B] [A'; A]."""
    total = 0.0
    for module, new in after.items():
        old = before[module]
        total += Factors(torch.cat([new.a, old.a]), torch.cat([new.b, -old.b], dim=1), new.scaling).square()
    return _root(total)


def _root(square: float) -> float:
    """Rounding can leave a square just below zero; NaN stays."""
    return 0.0 if square < 0 else math.sqrt(square)
