"""Size of a LoRA adapter's update of the base weights, and of a step's change of that update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraover.checkpoint.error_bounds import gamma, unit_roundoff
from loraover.overparam.expert_part import SIDES, part_of
from loraover.overparam.sharding import whole
from loraover.overparam.sites import lora_layers, matrices_of


@dataclass(frozen=True)
class Factors:
    """A and B of one module, copied in float64 to the CPU, and the module's scaling.

    Args:
        a: A, of shape (r, in_features).
        b: B, of shape (out_features, r).
        scaling: Factor of B A in the update of the base weight.
    """

    a: Tensor
    b: Tensor
    scaling: float

    def square(self) -> float:
        """Return ||scaling * B A||^2 = scaling^2 trace((B^T B)(A A^T)), from r x r products; 0 within rounding."""
        terms = (self.b.mT @ self.b) * (self.a @ self.a.mT)
        roundings = len(self.b) + self.a.shape[1] + terms.numel()
        total = float(terms.sum())
        is_zero = total < gamma(roundings, unit_roundoff(torch.float64)) * float(terms.abs().sum())
        return 0.0 if is_zero else self.scaling**2 * total


@torch.no_grad()
def factors(model: nn.Module) -> dict[str, Factors]:
    """Copy A and B of the active adapter, or the first one, of every module or expert, by its path."""
    found = {}
    for module, layer in lora_layers(model).items():
        name = layer.active_adapters[0]
        if name in layer.lora_A:
            a, b = whole(layer.lora_A[name].weight), whole(layer.lora_B[name].weight)
        elif name in layer.lora_embedding_A:
            a, b = whole(layer.lora_embedding_A[name]), whole(layer.lora_embedding_B[name])
        else:
            continue
        for (path, of_a), (_, of_b) in zip(*(matrices_of(module, layer, side) for side in SIDES), strict=True):
            found[path] = Factors(_copy(part_of(of_a, a)), _copy(part_of(of_b, b)), layer.scaling[name])
    return found


def _copy(matrix: Tensor) -> Tensor:
    return matrix.cpu().to(torch.float64, copy=True)  # an Apple GPU has no float64


def step_norm(before: Mapping[str, Factors], after: Mapping[str, Factors]) -> float:
    """Return the Frobenius norm of the change of scaling * B A: B' A' - B A = [B', -B] [A'; A], over all modules."""
    total = 0.0
    for module, new in after.items():
        old = before[module]
        total += Factors(torch.cat([new.a, old.a]), torch.cat([new.b, -old.b], dim=1), new.scaling).square()
    return math.sqrt(total)
