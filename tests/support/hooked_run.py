"""TinyNet trained by an ordinary optimizer with cores attached, and what a test looks at afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from loraover import LoraOverConfig, OverParameterization

from support.optimizers import adagrad, adamw_8bit, muon
from support.tiny_models import lora_matrices, net_loss, tiny_net, trainable

Step = Callable[[Any, Optimizer, int], None]


def ordinary_step(model: Any, optimizer: Optimizer, step: int) -> None:
    optimizer.zero_grad()
    net_loss(model, step).backward()
    optimizer.step()


def train(model: Any, optimizer: Optimizer, steps: range, step: Step = ordinary_step) -> dict[str, Tensor]:
    """The matrices after these steps."""
    for number in steps:
        step(model, optimizer, number)
    return lora_matrices(model)


def make(
    optimizer: Callable[[list[nn.Parameter]], Any] = lambda p: AdamW(p, lr=1e-2), **config: Any
) -> tuple[Any, OverParameterization, Any]:
    model = tiny_net()
    over = OverParameterization(model, LoraOverConfig(**config))
    chosen = optimizer(trainable(model))
    over.attach(chosen)
    return model, over, chosen


def cores(over: OverParameterization) -> list[Tensor]:
    return [stack.clone() for group in over.groups for stack in group.stacks]


def core_states(over: OverParameterization) -> list[dict[str, Any]]:
    places = [(group, k, i) for group in over.groups for k in group.trained for i in range(len(group.stacks[k]))]
    return [copy.deepcopy(group.core_state(k, i)) for group, k, i in places]


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal bit for bit, through dicts and lists."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def assert_contracted(over: OverParameterization) -> None:
    """Every matrix in the model is the contraction of its cores, rounded once to the matrix's dtype."""
    for group in over.groups:
        for site, matrix in zip(group.sites, group.contract(), strict=True):
            assert torch.equal(site.parameter, matrix.to(site.parameter.dtype)), site.name


# Optimizers


def _adafactor(**options: Any) -> Callable[[list[nn.Parameter]], Any]:
    def build(parameters: list[nn.Parameter]) -> Any:
        from transformers import Adafactor

        return Adafactor(parameters, **options)

    return build


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "adamw": lambda p: AdamW(p, lr=1e-2),
    "adamw-fused": lambda p: AdamW(p, lr=1e-2, fused=True),
    "adamw-amsgrad": lambda p: AdamW(p, lr=1e-2, amsgrad=True),
    "adam-tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2)),
    "sgd-nesterov": lambda p: SGD(p, lr=1e-1, momentum=0.9, nesterov=True),
    "adagrad": lambda p: adagrad(p, lr=1e-1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "torch-adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "muon": lambda p: muon(p, lr=1e-2),
    "adafactor": _adafactor(lr=1e-2, relative_step=False, scale_parameter=False),
    "adafactor-relative": _adafactor(),
    "adamw-8bit": adamw_8bit,
}
