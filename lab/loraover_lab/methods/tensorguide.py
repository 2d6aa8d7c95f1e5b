"""TensorGuide: one tensor train, applied to a frozen Gaussian input, gives A and B of a module.

A module with r, in_features and out_features has the cores C_k of shape (R_k, n_k, m_k, R_{k+1}), R_1 = R_{d+1} = 1,
and the input z of shape (n_1, ..., n_d). With prod m_k = r (in_features + out_features), the train gives the vector

    y[m_1..m_d] = sum over n_1..n_d of z[n_1..n_d] C_1[n_1, m_1] C_2[n_2, m_2] ... C_d[n_d, m_d]

whose first r in_features elements are A^T and the others B_y^T, both row by row. LoRA's B is B_y minus its value at the
start, so that the model begins as the base model. Only the cores are trained, and they are fewer numbers than those of
A and B: this compresses a LoRA, where LoRA-Over enriches it. The result is a plain LoRA of rank r: A and B as the cores
give them, computed in float64 and rounded once.

Cores live beside the optimizer, as those of LoRA-Over do. The model holds A and B, whose gradients are summed over the
micro-batches and clipped. The hook before a step turns them into gradients of the cores by one vector-Jacobian product,
and the hook after it writes A and B. Modules of one shape have stacked cores, which one batched contraction serves.

Source: Qi et al. 2025, arXiv:2506.16456. Its abstract, overviews of it (delta_W = W_2 W_1 from one train, driven by
Gaussian noise) and the authors' public code for quantum dots (jqi41/TT2LoRA, the method's first name: shapes of the
cores, order of y, frozen z) were read; the paper's equations and its settings for GPT-2 were not.

Departures: B is B_y minus its first value, since both factors start non-zero (in the code, the train is the whole head
of a classifier, and no base model's function has to be kept); cores start with the deviation that gives A the variance
of PEFT's (the code's is 0.1); each mode of z is 2, and modes m_k are as even as prime factors allow (the code names all
by hand); z and the cores are drawn for each module by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, final

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from loraover.common.errors import ConfigError
from loraover.common.strict_json import StrictModel
from loraover.overparam.core_group import full_precision, seeded_generator
from loraover.overparam.decompositions.mpo import balanced_factors
from loraover.overparam.sharding import assign
from loraover.overparam.sites import lora_layers
from loraover.training.method import ADAPTER, TrainingMethod
from loraover.training.recipe_parts import BaseRecipe
from loraover_lab.methods.layers import Pair, check_optimizer, make_optimizer

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import Trainer

    from loraover.training.run.trainer import TrainingProgress

TRAINS_FILE = "tensorguide.safetensors"

INPUT_MODE = 2
"""Size of each mode of the Gaussian input, the n_k."""


class CoreLayout(NamedTuple):
    """Sizes of the trains of modules of one shape: core k is (bonds[k], INPUT_MODE, modes[k], bonds[k + 1])."""

    r: int
    in_features: int
    out_features: int
    modes: tuple[int, ...]
    bonds: tuple[int, ...]

    @property
    def core_shapes(self) -> list[tuple[int, int, int, int]]:
        """Shape of each core of one module."""
        return [(self.bonds[k], INPUT_MODE, mode, self.bonds[k + 1]) for k, mode in enumerate(self.modes)]

    def num_parameters(self) -> int:
        """Count the numbers in the cores of one module."""
        return sum(prod(shape) for shape in self.core_shapes)


def make_layout(settings: TensorGuideSettings, path: str, r: int, in_features: int, out_features: int) -> CoreLayout:
    """Return modes and bonds of one module; a bond is the full one where that is smaller than `tt_rank`."""
    count, size = settings.cores, r * (in_features + out_features)
    place = f"A and B of {path} are {r} x ({in_features} + {out_features}) = {size} numbers"
    modes = balanced_factors(size, count)
    if 1 in modes:
        fit = sum(factor > 1 for factor in modes)
        raise ConfigError(
            f"tensorguide.cores is {count}, and {place}, which have {fit} prime factors; lower it to that, change "
            "lora.r, or leave the module out of lora.target_modules."
        )
    sizes = [INPUT_MODE * mode for mode in modes]
    inner = [min(settings.tt_rank, prod(sizes[:k]), prod(sizes[k:])) for k in range(1, count)]
    layout = CoreLayout(r, in_features, out_features, modes, (1, *inner, 1))
    if layout.num_parameters() >= size:
        raise ConfigError(
            f"tensorguide.tt_rank is {settings.tt_rank}, and {place}, while a train with modes {modes} would have "
            f"{layout.num_parameters()}, so that it compresses nothing; lower it, change tensorguide.cores or lora.r, "
            "or leave the module out of lora.target_modules."
        )
    return layout


def contract(cores: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """Apply the tensor trains of G modules, core k (G, R_k, n_k, m_k, R_{k+1}), to inputs (G, n_1, ..., n_d)."""
    group = len(inputs)
    if len(cores) > 2:  # joined first, so that no tensor as large as y is moved twice
        *cores, left, right = cores
        joined = torch.einsum("gbnmc,gcxyd->gbnxmyd", left, right)
        cores = [*cores, joined.flatten(2, 3).flatten(3, 4)]
    done = inputs.reshape(group, 1, 1, -1)  # modes m so far, bond, modes n to come
    for core in cores:
        _, bond, read, _, following = core.shape
        done = torch.einsum("gabnt,gbnmc->gamct", done.reshape(group, -1, bond, read, done.shape[3] // read), core)
        done = done.reshape(group, -1, following, done.shape[4])
    return done.reshape(group, -1)


def split(vectors: Tensor, layout: CoreLayout) -> Pair:
    """Return B (G, out_features, r) and A (G, r, in_features) of the vectors (G, r (in_features + out_features))."""
    r, at = layout.r, layout.r * layout.in_features
    a = vectors[:, :at].reshape(-1, layout.in_features, r).mT
    return Pair(vectors[:, at:].reshape(-1, r, layout.out_features).mT, a)


@final
class Trains(nn.Module):
    """Trained cores of G modules of one shape, their inputs, and their cores at the start.

    Args:
        layout: Sizes of each train.
        layers: Adapted layers by path, whose A and B the trains give.
        seed: Seed of the cores at the start.
        input_seed: Seed of the inputs.
    """

    inputs: Tensor

    def __init__(self, layout: CoreLayout, layers: dict[str, LoraLayer], seed: int, input_seed: int) -> None:
        super().__init__()
        self.layout = layout
        self.layers = list(layers.values())
        dtype = torch.promote_types(self.factors("A")[0].dtype, torch.float32)
        inputs, drawn = [], []
        for path in layers:
            generator = seeded_generator(input_seed, f"{path}.input")
            inputs.append(torch.randn([INPUT_MODE] * len(layout.modes), generator=generator, dtype=torch.float64))
            drawn.append(draw_cores(layout, inputs[-1], seeded_generator(seed, f"{path}.cores")))
        cores = [torch.stack(each).to(dtype) for each in zip(*drawn, strict=True)]
        self.register_buffer("inputs", torch.stack(inputs).to(dtype))
        self.first = nn.ParameterList([nn.Parameter(core, requires_grad=False) for core in cores])
        self.cores = nn.ParameterList([nn.Parameter(core.clone()) for core in cores])

    def factors(self, name: Literal["A", "B"]) -> list[nn.Parameter]:
        """Return the parameters A or B of the layers."""
        return [getattr(layer, f"lora_{name}")[ADAPTER].weight for layer in self.layers]

    def pair(self) -> Pair:
        """Return B (G, out_features, r) and A (G, r, in_features) as the cores give them."""
        each = list(self.cores), list(self.first)
        now, first = (split(contract(cores, self.inputs), self.layout) for cores in each)
        return Pair(now.b - first.b, now.a)

    @torch.no_grad()
    def write(self) -> None:
        """Write A and B of all layers, cast to their dtype."""
        with full_precision(self.inputs.device):
            b, a = self.pair()
        assign(self.factors("B"), b)
        assign(self.factors("A"), a)

    def pull_back(self) -> None:
        """Turn the gradients of A and B into those of the cores; a layer without gradients counts as zero."""
        dense = [stack_gradients(self.factors("B")), stack_gradients(self.factors("A"))]
        with torch.enable_grad(), full_precision(self.inputs.device):
            pair = split(contract(list(self.cores), self.inputs), self.layout)
            gradients = torch.autograd.grad(pair, list(self.cores), [d.to(self.inputs.dtype) for d in dense])
        for core, gradient in zip(self.cores, gradients, strict=True):
            core.grad = gradient.contiguous()  # a fused optimizer walks through memory


def stack_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the gradients of G parameters of one shape, stacked; zero where there is none."""
    return torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])


def draw_cores(layout: CoreLayout, z: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Draw the cores of one train so that y has the variance of PEFT's first A, which is 1 / (3 in_features)."""
    paths = float(z.square().sum()) * prod(layout.bonds)  # y is a sum over z and the bonds of products of d numbers
    deviation = (1 / (3 * layout.in_features * paths)) ** (1 / (2 * len(layout.modes)))
    return [deviation * torch.randn(s, generator=generator, dtype=torch.float64) for s in layout.core_shapes]


@final
class TensorGuide(TrainingMethod):
    """A and B of each module from one tensor train."""

    settings: TensorGuideSettings
    learning_rate: ClassVar[float] = 1e-2
    no_start: ClassVar[str] = "A and B start from cores that it draws"

    def __init__(self, recipe: BaseRecipe) -> None:
        super().__init__(recipe)
        self.trains: list[Trains] = []

    @classmethod
    def check_recipe(cls, recipe: BaseRecipe) -> None:
        super().check_recipe(recipe)
        check_optimizer(recipe)
        if recipe.training.fp16 or recipe.training.weight_decay:
            raise ValueError(
                "method tensorguide takes neither training.fp16 nor training.weight_decay: smaller cores would not "
                "bring B back to zero"
            )

    def start(self, model: PeftModel) -> None:
        seed = self.recipe.training.seed
        input_seed = seed if self.settings.input_seed is None else self.settings.input_seed
        alike: dict[CoreLayout, dict[str, LoraLayer]] = {}
        for path, (layer, layout) in self._layouts(model).items():
            alike.setdefault(layout, {})[path] = layer
        self.trains = [Trains(layout, layers, seed, input_seed) for layout, layers in alike.items()]
        for trains in self.trains:
            trains.write()

    def count_cores(self, model: PeftModel) -> int:
        return sum(layout.num_parameters() for _, layout in self._layouts(model).values())

    def train(self, trainer: Trainer, checkpoint: Path | None, steps: int, progress: TrainingProgress) -> None:
        for trains in self.trains:
            trains.to(trains.factors("A")[0].device)
        trainer.optimizer = self.attach(make_optimizer(trainer.args, self.trained()))
        super().train(trainer, checkpoint, steps, progress)

    def trained(self) -> list[nn.Parameter]:
        """Return the cores of all trains."""
        return [core for trains in self.trains for core in trains.cores]

    def attach(self, optimizer: Optimizer) -> Optimizer:
        """Hook an optimizer of the cores, so that its step reads gradients of A and B, and writes A and B."""

        def before(*_: Any) -> None:
            for trains in self.trains:
                trains.pull_back()

        def after(*_: Any) -> None:
            for trains in self.trains:
                trains.write()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        return optimizer

    def restore(self, checkpoint: Path) -> None:
        tensors = load_file(checkpoint / TRAINS_FILE)
        nn.ModuleList(self.trains).load_state_dict(tensors)

    def save(self, checkpoint: Path) -> None:
        """Add the cores, those of the start and the inputs."""
        save_file(nn.ModuleList(self.trains).state_dict(), checkpoint / TRAINS_FILE)

    def finish(self, model: PeftModel) -> None:
        for trains in self.trains:
            trains.cpu().double().write()  # an Apple GPU has no float64

    def _layouts(self, model: PeftModel) -> dict[str, tuple[LoraLayer, CoreLayout]]:
        """Return each adapted layer and the sizes of its train, by path."""
        found = {}
        for path, layer in lora_layers(model).items():
            if ADAPTER not in layer.lora_A or layer.lora_A[ADAPTER].weight.ndim != 2:
                kind = type(layer.get_base_layer()).__name__
                raise ConfigError(
                    f"lora.target_modules: {path} has type {kind}; tensorguide takes linear layers only, leave it out."
                )
            r, in_features = layer.lora_A[ADAPTER].weight.shape
            found[path] = layer, make_layout(self.settings, path, r, in_features, len(layer.lora_B[ADAPTER].weight))
        return found


class TensorGuideSettings(StrictModel):
    """Settings of `method: tensorguide`."""

    method: ClassVar[type[TrainingMethod]] = TensorGuide

    tt_rank: int = Field(8, ge=1, description="Largest bond between two cores of a tensor train.")
    cores: int = Field(
        4, ge=2, le=12, description="Number of cores, among which r (in_features + out_features) is divided as factors."
    )
    input_seed: int | None = Field(
        None, ge=0, lt=2**32, description="Seed of the frozen Gaussian inputs; None: training.seed."
    )
