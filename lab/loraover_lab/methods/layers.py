"""Adapted layers with their factors and base weights, for methods that change them; and plain optimizers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loraover.common.errors import ConfigError
from loraover.overparam.sites import lora_layers
from loraover.training.method import ADAPTER, optimizer_class
from loraover.training.recipe_parts import BaseRecipe

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import TrainingArguments

PLAIN_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "sgd")
"""Optimizers that `make_optimizer` makes."""


class Pair(NamedTuple):
    """Factors of one module: B of shape (out_features, r) and A of shape (r, in_features)."""

    b: Tensor
    a: Tensor


def linear_layers(model: nn.Module, method: str) -> dict[str, LoraLayer]:
    """Return the adapted layers by path, for a method that changes their base weights while it trains."""
    from transformers.pytorch_utils import Conv1D

    layers = lora_layers(model)
    count = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for path, layer in layers.items():
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear | Conv1D) or not base.weight.is_floating_point():
            weight = getattr(base, "weight", None)
            kind = type(base).__name__ + ("" if weight is None else f" of {weight.dtype}")
            raise ConfigError(
                f"lora.target_modules: {path} has type {kind}; {method} takes linear layers of floats only."
            )
        if count[id(base.weight)] > 1:
            raise ConfigError(
                f"lora.target_modules: {path} shares its weight with another module, so {method} cannot change it "
                "alone; leave it out."
            )
    return layers


def get_weight(layer: LoraLayer) -> Tensor:
    """Return the base weight of an adapted layer as a view of shape (out_features, in_features)."""
    from transformers.pytorch_utils import Conv1D

    base = layer.get_base_layer()
    weight: Tensor = base.weight.detach()
    return weight.mT if isinstance(base, Conv1D) else weight


def get_pair(layer: LoraLayer) -> Pair:
    """Return the present B and A of an adapted layer."""
    return Pair(layer.lora_B[ADAPTER].weight.detach(), layer.lora_A[ADAPTER].weight.detach())


class OriginalWeights:
    """Copies of the adapted base weights, kept in the CPU's memory while a method changes them."""

    def __init__(self, layers: Mapping[str, LoraLayer]) -> None:
        self.layers = layers
        self.kept = {path: get_weight(layer).cpu().clone() for path, layer in layers.items()}

    def restore(self) -> None:
        """Put the original weights back, bit by bit."""
        for path, layer in self.layers.items():
            get_weight(layer).copy_(self.kept[path])


def set_pairs(layers: Mapping[str, LoraLayer], pairs: Mapping[str, Pair]) -> None:
    """Replace A and B of every layer by others, whose rank may be larger; the layer's scaling stays as it is."""
    for path, layer in layers.items():
        b, a = pairs[path]
        for module, value in ((layer.lora_A[ADAPTER], a), (layer.lora_B[ADAPTER], b)):
            old = module.weight
            # A copy, since .contiguous() returns a slice of rank 1 itself, and training would change what it came from.
            module.weight = nn.Parameter(value.to(old, copy=True).contiguous())
        layer.lora_A[ADAPTER].out_features = layer.lora_B[ADAPTER].in_features = layer.r[ADAPTER] = len(a)


def widen(model: PeftModel, factor: int) -> None:
    """Multiply all ranks of a model's LoraConfig, and its alphas so that every scaling stays the same."""
    config = model.peft_config[ADAPTER]
    alpha = math.sqrt(factor) if config.use_rslora else factor
    config.r *= factor
    config.lora_alpha *= alpha
    config.rank_pattern = {pattern: r * factor for pattern, r in config.rank_pattern.items()}
    config.alpha_pattern = {pattern: value * alpha for pattern, value in config.alpha_pattern.items()}


def flatten(model: PeftModel, layers: Mapping[str, LoraLayer], rank: int) -> None:
    """Give a model's LoraConfig one rank for all modules and scaling 1."""
    config = model.peft_config[ADAPTER]
    config.r, config.lora_alpha, config.use_rslora = rank, rank, False
    config.rank_pattern, config.alpha_pattern = {}, {}
    for layer in layers.values():
        layer.scaling[ADAPTER] = 1.0


def truncate(b: Tensor, a: Tensor, rank: int) -> tuple[Pair, float]:
    """Return the best approximation of B A of a rank, in float64, and the Frobenius norm of its error.

    The singular values come from the factors, without forming the product (Eckart and Young 1936). Where B A has a
    smaller rank, the rest of the factors is zero.
    """
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.mT)
    u, values, vt = torch.linalg.svd(upper @ lower.mT)
    root = values[:rank].sqrt()
    kept = b.new_zeros(len(b), rank), a.new_zeros(rank, a.shape[1])
    kept[0][:, : len(root)] = left @ u[:, :rank] * root
    kept[1][: len(root)] = root[:, None] * (vt[:rank] @ right.mT)
    return Pair(*kept), float(values[rank:].norm())


def check_optimizer(recipe: BaseRecipe) -> None:
    """Raise ValueError if a recipe asks for an optimizer that `make_optimizer` does not make."""
    training = recipe.training
    if training.optim not in PLAIN_OPTIMIZERS or training.loraplus_lr_ratio is not None:
        raise ValueError(f"method {recipe.method} takes training.optim {', '.join(PLAIN_OPTIMIZERS)}, without LoRA+")


def make_optimizer(asked: TrainingArguments, parameters: list[nn.Parameter]) -> Optimizer:
    """Return the optimizer that a trainer is to have, one of `PLAIN_OPTIMIZERS`, for a method that makes it itself."""
    kind, options = optimizer_class(asked)
    made: Optimizer = kind(parameters, weight_decay=asked.weight_decay, **options)
    return made
