"""SoMA: the minor singular components of the base weights are trained, and the rest of the weights is frozen.

With the singular value decomposition W = U S V^T of a base weight and its r smallest singular triplets:

    B_0 = U_r (S_r / s)^1/2,   A_0 = (S_r / s)^1/2 V_r^T,   W_res = W - s B_0 A_0

where s is LoRA's scaling. Training starts from A_0 and B_0 on the frozen W_res, so the function of the model is that of
the base model at the start. The first blocks get no LoRA. The weight decay falls along a cosine.
AdamW decouples it from the gradient, and SGD adds it to the gradient.

The result is a plain LoRA of rank 2 r on W, not on W_res: delta_W = s [B, -B_0] [A; A_0]. It leaves out the rounding of
W_res to the base model's data type only, whose norm is measured. A_0 and B_0 are computed in float64 from the base
model, so a resumed run finds them again.

Source: Yun et al. 2025, CVPR, arXiv:2412.04077 (first version: SoRA). Its abstract, its overviews and the authors'
public code (ysj9909/SoMA: split, first trained block, schedules) were read; the paper's equations were not. The code
freezes 8 of 24 blocks and lets the weight decay fall from 0.05 to 1e-5, which are the defaults here (a third).

Departures: biases are not trained, since no LoRA can hold them (the code trains them); no moving average of the weights
(the code's configurations for segmentation have one); language models in place of vision backbones, without a head that
is trained in full; the learning rate's schedule is the recipe's.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from loraover.common.errors import ConfigError
from loraover.common.strict_json import StrictModel
from loraover.training.method import ADAPTER, TrainingMethod
from loraover.training.recipe_parts import BaseRecipe
from loraover_lab.methods.layers import OriginalWeights, Pair, get_pair, get_weight, linear_layers, set_pairs, widen

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

SHARE_FROZEN = 3
"""Number of blocks of which one is frozen by default."""


@final
class Soma(TrainingMethod):
    """Minor singular components."""

    settings: SomaSettings
    trains_seq2seq: ClassVar[bool] = False
    no_start: ClassVar[str] = "A and B start from singular components of the base weights"

    def __init__(self, recipe: BaseRecipe) -> None:
        super().__init__(recipe)
        self._layers: dict[str, LoraLayer] = {}
        self._original: OriginalWeights
        self._first: dict[str, Pair] = {}
        self._rounding = 0.0

    @classmethod
    def check_recipe(cls, recipe: BaseRecipe) -> None:
        super().check_recipe(recipe)
        if recipe.training.weight_decay:
            raise ValueError("method soma takes soma.weight_decay in place of training.weight_decay")

    def lora_options(self, base: PreTrainedModel) -> dict[str, Any]:
        path, blocks = find_blocks(base)
        frozen = self.settings.frozen_blocks
        if frozen is None:
            frozen = blocks // SHARE_FROZEN
        if frozen >= blocks:
            raise ConfigError(
                f"soma.frozen_blocks is {frozen}, and {self.recipe.model} has {blocks} blocks; freeze at most "
                f"{blocks - 1}, so that something is trained."
            )
        if not frozen:
            return {}
        return {"exclude_modules": rf"{re.escape(path)}\.(?:{'|'.join(map(str, range(frozen)))})\..+"}

    @torch.no_grad()
    def start(self, model: PeftModel) -> None:
        self._layers = linear_layers(model, "soma")
        self._original = OriginalWeights(self._layers)
        square = 0.0
        for path, layer in self._layers.items():
            weight, scaling = get_weight(layer), layer.scaling[ADAPTER]
            if layer.r[ADAPTER] > min(weight.shape):
                raise ConfigError(
                    f"lora.r is {layer.r[ADAPTER]}, and {path} of shape {tuple(weight.shape)} has "
                    f"{min(weight.shape)} singular values; lower it, or leave the module out."
                )
            b, a = split(weight, layer.r[ADAPTER], scaling)
            first = self._first[path] = Pair(b.float(), a.float())
            exact = wide(weight) - scaling * first.b.double() @ first.a.double()
            get_weight(layer).copy_(exact)
            square += float((wide(get_weight(layer)) - exact).square().sum())
        set_pairs(self._layers, self._first)
        self._rounding = math.sqrt(square)

    def before_step(self, step: int, steps: int, optimizer: Optimizer) -> None:
        """Let the weight decay fall along half a cosine, from the first step to the end of training."""
        start, end = self.settings.weight_decay, self.settings.final_weight_decay
        share = (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["weight_decay"] = end + (start - end) * share

    def finish(self, model: PeftModel) -> float:
        pairs = {}
        for path, layer in self._layers.items():
            (b, a), (b0, a0) = get_pair(layer), self._first[path]
            pairs[path] = Pair(torch.cat([b, -b0.to(b)], dim=1), torch.cat([a, a0.to(a)]))
        self._original.restore()
        set_pairs(self._layers, pairs)
        widen(model, 2)
        return self._rounding


def find_blocks(base: PreTrainedModel) -> tuple[str, int]:
    """Return the path of a causal model's list of blocks, and their number."""
    blocks = base.config.get_text_config().num_hidden_layers
    for path, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == blocks:
            return path, blocks
    raise ConfigError(f"{base.config.model_type} models have no list of {blocks} blocks, which soma counts.")


def wide(weight: Tensor) -> Tensor:
    """Return a copy in float64, on the CPU if the device has no float64."""
    return weight.to("cpu" if weight.device.type == "mps" else weight.device, torch.float64)


def split(weight: Tensor, r: int, scaling: float) -> Pair:
    """Return B_0 and A_0 in float64, whose product times the scaling is the part of the r smallest singular values."""
    u, values, vt = torch.linalg.svd(wide(weight), full_matrices=False)
    root = (values[-r:] / scaling).sqrt()
    return Pair(u[:, -r:] * root, root[:, None] * vt[-r:])


class SomaSettings(StrictModel):
    """Settings of `method: soma`."""

    method: ClassVar[type[TrainingMethod]] = Soma

    frozen_blocks: int | None = Field(
        None, ge=0, description="Number of blocks, from the first one on, that get no LoRA; None: a third of them."
    )
    weight_decay: float = Field(
        0.05, ge=0, allow_inf_nan=False, description="Weight decay at the first step; training.weight_decay stays 0."
    )
    final_weight_decay: float = Field(
        1e-5, ge=0, allow_inf_nan=False, description="Weight decay at the end of a cosine over all steps."
    )
