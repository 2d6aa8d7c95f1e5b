"""LoRASC: stages of a fast LoRA, each blended into a slow one, with noise on the base weights while they train.

A stage t = 1..T trains a new fast LoRA B_t A_t on frozen weights W_{t-1} + E_t, blends it into the slow LoRA S, and
adds the slow LoRA to the weights for the next stage (s is LoRA's scaling, a the pace, S_0 = 0, W_0 = W):

    S_t = (1 - a) S_{t-1} + a s B_t A_t,   W_t = W_{t-1} + S_t
    E_t = noise std(W) U,   U uniform on [-1/2, 1/2], drawn once for each stage

Without the noise, W_T - W = sum_t c_t s B_t A_t with c_t = 1 - (1 - a)^(T - t + 1): a plain LoRA of rank T r, exactly,
whose factors are those of the stages side by side. `lorasc.rank` asks for its best approximation of a smaller rank,
whose error is measured. So is the rounding of W_{T-1} + E_T to the base model's data type: the last fast LoRA trains on
rounded weights, and the result leaves the rounding out. The error is the root of the sum of squares of both.

Source: Li et al. 2024, EMNLP Findings, arXiv:2407.01491. Its abstract and the caption of its figure 1 were read (fast
LoRA on a noisy backbone, "a portion of the learned fast LoRA is weighted and merged into the slow LoRA", slow LoRA
merged into the backbone). Its equations could not be read, and its code was not found. So these are this file's
choices: the products B A are blended and not A and B separately, which would depend on the sign and order of their
columns; the form of the noise is NoisyTune's (Wu et al. 2022, arXiv:2202.12024); the defaults of pace and noise.

Departures: the noise is on the adapted weights only; a stage is a share of the run's steps and not an epoch; the
learning rate has one schedule over the run; the optimizer's moments start again in each stage.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, final

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from loraover.common.errors import ConfigError
from loraover.common.strict_json import StrictModel
from loraover.training.method import ADAPTER, TrainingMethod
from loraover.training.recipe_parts import BaseRecipe
from loraover_lab.methods.layers import (
    OriginalWeights,
    Pair,
    flatten,
    get_pair,
    get_weight,
    linear_layers,
    set_pairs,
    truncate,
    widen,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

STAGES_FILE = "lorasc.safetensors"


@final
class LoraSc(TrainingMethod):
    """Stages of a fast LoRA that are blended into a slow one."""

    settings: LoraScSettings
    no_start: ClassVar[str] = "each of its stages begins with a new A and B, and what they learn is blended"

    def __init__(self, recipe: BaseRecipe) -> None:
        super().__init__(recipe)
        self.layers: dict[str, LoraLayer] = {}
        self.original: OriginalWeights
        self.ended: list[dict[str, Pair]] = []

    def start(self, model: PeftModel) -> None:
        self.layers = linear_layers(model, "lorasc")
        self.original = OriginalWeights(self.layers)

    def check(self, steps: int, examples: int) -> None:
        if self.settings.stages > steps:
            raise ConfigError(
                f"lorasc.stages is {self.settings.stages}, and the run has {steps} optimizer steps; a stage takes one "
                "or more. Lower it, or raise training.max_steps."
            )
        exact = self.settings.stages * max(layer.r[ADAPTER] for layer in self.layers.values())
        if self.settings.rank is not None and self.settings.rank >= exact:
            raise ConfigError(
                f"lorasc.rank is {self.settings.rank}, and the sum of the stages has rank {exact}; leave it out."
            )

    def restore(self, checkpoint: Path) -> None:
        tensors = load_file(checkpoint / STAGES_FILE)
        stages = 1 + max((int(key.split(".", 1)[0]) for key in tensors), default=-1)
        self.ended = [
            {path: Pair(tensors[f"{t}.{path}.B"], tensors[f"{t}.{path}.A"]) for path in self.layers}
            for t in range(stages)
        ]

    def begin(self) -> None:
        self.set_base()

    def before_step(self, step: int, steps: int, optimizer: Optimizer) -> None:
        """End a stage before the first step of the next one."""
        if stage_of(step, steps, self.settings.stages) > len(self.ended):
            self.end_stage()
            self.begin_fast_lora()
            self.set_base()
            optimizer.state.clear()

    def save(self, checkpoint: Path) -> None:
        """Add the factors of the stages that have ended."""
        tensors = {
            f"{t}.{path}.{name}": value.contiguous()
            for t, stage in enumerate(self.ended)
            for path, pair in stage.items()
            for name, value in (("B", pair.b), ("A", pair.a))
        }
        save_file(tensors, checkpoint / STAGES_FILE)

    def end_stage(self) -> None:
        """Keep the factors of the fast LoRA."""
        self.ended.append({path: Pair(*(t.cpu().clone() for t in get_pair(at))) for path, at in self.layers.items()})

    @torch.no_grad()
    def begin_fast_lora(self) -> None:
        """Give every layer a new fast LoRA: A uniform as PEFT draws it, B zero."""
        generator = self._generator("lora")
        for layer in self.layers.values():
            b, a = get_pair(layer)
            drawn = torch.rand(a.shape, generator=generator) * 2 - 1
            a.copy_(drawn / math.sqrt(a.shape[1]))
            b.zero_()

    @torch.no_grad()
    def set_base(self) -> float:
        """Put the sum of the slow LoRAs so far, and the noise of the present stage, onto the base weights."""
        generator = self._generator("noise")
        square = 0.0
        for path, layer in self.layers.items():
            original = self.original.kept[path]
            value, exact = original.float(), original.double()
            if self.settings.noise:
                drawn = torch.rand(value.shape, generator=generator) - 0.5
                noise = self.settings.noise * original.float().std() * drawn
                value, exact = value + noise, exact + noise
            if self.ended:
                b, a = self._sum(path)
                value = value + layer.scaling[ADAPTER] * (b @ a)
                exact = exact + layer.scaling[ADAPTER] * (b.double() @ a.double())
            weight = get_weight(layer).copy_(value)
            square += float((weight.cpu().double() - exact).square().sum())
        return math.sqrt(square)

    def finish(self, model: PeftModel) -> float:
        rounding = self.set_base()  # of the last stage, which a run that resumes after its last step has not set
        self.end_stage()
        self.original.restore()
        rank = self.settings.rank
        if rank is None:
            set_pairs(self.layers, {path: self._sum(path) for path in self.layers})
            widen(model, len(self.ended))
            return rounding
        pairs, square = {}, rounding**2
        for path, layer in self.layers.items():
            b, a = self._sum(path)
            pairs[path], error = truncate(b.double() * layer.scaling[ADAPTER], a.double(), rank)
            square += error**2
        set_pairs(self.layers, pairs)
        flatten(model, self.layers, rank)
        return math.sqrt(square)

    def _sum(self, path: str) -> Pair:
        """Return the factors of the sum of the slow LoRAs of one module."""
        weights = blend_weights(self.settings.pace, len(self.ended))
        pairs = [stage[path] for stage in self.ended]
        return Pair(
            torch.cat([weight * b for weight, (b, _) in zip(weights, pairs, strict=True)], dim=1),
            torch.cat([a for _, a in pairs]),
        )

    def _generator(self, purpose: str) -> torch.Generator:
        """Return a generator that is the same whenever the stage begins, after a resumption too."""
        number = 2 * (self.recipe.training.seed * (self.settings.stages + 1) + len(self.ended))
        return torch.Generator().manual_seed(number + (purpose == "noise"))


def blend_weights(pace: float, stages: int) -> list[float]:
    """Return c_t for t = 1..T: the weight of each stage's fast LoRA in the sum of the slow LoRAs."""
    return [1 - (1 - pace) ** (stages - t) for t in range(stages)]


def stage_of(step: int, steps: int, stages: int) -> int:
    """Return the stage, from 0, of an optimizer step; the lengths of two stages differ by one step at most."""
    return step * stages // steps


class LoraScSettings(StrictModel):
    """Settings of `method: lorasc`."""

    method: ClassVar[type[TrainingMethod]] = LoraSc

    stages: int = Field(3, ge=1, description="Number of fast LoRAs that are trained one after the other.")
    pace: float = Field(0.8, gt=0, le=1, description="Share of a stage's fast LoRA in the slow one; 1: no averaging.")
    noise: float = Field(
        0.15,
        ge=0,
        allow_inf_nan=False,
        description="Width of the uniform noise on the adapted base weights, in standard deviations of each weight.",
    )
    rank: int | None = Field(
        None, ge=1, description="Rank of the result, as its best approximation; None: stages times r, exactly."
    )
