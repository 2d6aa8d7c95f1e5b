"""Training beside the optimizer equals autograd through the cores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, AdamW, Optimizer

from loraover import LoraOverConfig, OverParameterization
from loraover.overparam.decompositions import DECOMPOSITIONS, make_decomposition

from support.devices import DEVICE
from support.optimizers import adagrad
from support.parallel_run import deviation
from support.tiny_models import net_batch, net_loss, tiny_net, trainable

STEPS, MICRO_BATCHES, WEIGHT_DECAY = 20, 4, 0.1
MAX_NORM = 0.05  # below the gradients' norm at every step, so that clipping acts

# Each side rounds a gradient by at most gamma_k |g|, with k < 100 terms and |g| < 1: 1e-14. Adam's and
# Adagrad's update is at most lr / EPS = 10 times as steep in g, SGD's less: 1e-13 per step, 2e-12 over 20
# steps, and the loss is too flat to amplify it. Seen: 2e-16, since the two sides round almost alike.
EPS, LR = 1e-3, 1e-2
TOLERANCE = 2e-12

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda p: AdamW(p, lr=LR, eps=EPS, foreach=False),
    "adamw-foreach": lambda p: AdamW(p, lr=LR, eps=EPS, foreach=True),
    "adamw-fused": lambda p: AdamW(p, lr=LR, eps=EPS, fused=True),
    "sgd": lambda p: SGD(p, lr=LR, momentum=0.9),
    "adagrad": lambda p: adagrad(p, lr=LR, eps=EPS),
}


@dataclass(frozen=True)
class Case:
    optimizer: str
    decomposition: str
    clipped: bool = False
    closure: bool = False

    def __str__(self) -> str:
        return f"{self.optimizer}-{self.decomposition}" + "-clipped" * self.clipped + "-closure" * self.closure

    def make(self) -> tuple[Any, OverParameterization]:
        model = tiny_net(dtype=torch.float64)
        return model, OverParameterization(model, LoraOverConfig(decomposition=self.decomposition, seed=3))


IN_THE_GRAPH = [name for name in DECOMPOSITIONS if make_decomposition(name).trains_all]
"""Decompositions of which autograd and the optimizer have every core; test_eigen has an oracle of the other."""

CASES = [
    Case(optimizer, decomposition, clipped=both, closure=both)
    for optimizer, decomposition, both in product(OPTIMIZERS, IN_THE_GRAPH, (False, True))
]


def beside(case: Case) -> dict[str, Tensor]:
    """Each matrix after every step, trained with the hooks: (STEPS, m, n) by site."""
    model, over = case.make()
    optimizer = OPTIMIZERS[case.optimizer]([{"params": trainable(model), "weight_decay": WEIGHT_DECAY}])
    over.attach(optimizer)
    history: dict[str, list[Tensor]] = {name: [] for name in over.sites}

    def evaluate(step: int) -> Tensor:
        optimizer.zero_grad()
        for batch in range(MICRO_BATCHES):
            loss = net_loss(model, MICRO_BATCHES * step + batch) / MICRO_BATCHES
            loss.backward()
        if case.clipped:
            nn.utils.clip_grad_norm_(trainable(model), MAX_NORM)
        return loss.detach()  # type: ignore[no-any-return]

    for step in range(STEPS):
        if case.closure:
            optimizer.step(lambda step=step: float(evaluate(step)))  # type: ignore[misc]
        else:
            evaluate(step)
            optimizer.step()
        for name, site in over.sites.items():
            history[name].append(site.parameter.detach().clone())
    return {name: torch.stack(matrices) for name, matrices in history.items()}


@cache
def through(case: Case) -> dict[str, Tensor]:
    """The same, with the cores in the graph and in the optimizer, as ordinary parameters."""
    model, over = case.make()
    cores: dict[str, list[nn.Parameter]] = {}
    centres: list[nn.Parameter] = []
    auxiliary: list[nn.Parameter] = []
    for name, (group, i) in over.injected.items():
        cores[name] = [nn.Parameter(stack[i].clone()) for stack in group.stacks]
        for k, core in enumerate(cores[name]):
            (centres if k == group.centre else auxiliary).append(core)
    optimizer = OPTIMIZERS[case.optimizer](
        [{"params": centres, "weight_decay": WEIGHT_DECAY}, {"params": auxiliary, "weight_decay": 0.0}]
    )
    keys = {id(parameter): key for key, parameter in model.named_parameters()}

    def contract(name: str) -> Tensor:
        return over.decomposition.contract([core[None] for core in cores[name]], *over.sites[name].shape)[0]

    history: dict[str, list[Tensor]] = {name: [] for name in cores}
    for step in range(STEPS):
        matrices = {name: contract(name) for name in cores}
        weights = {keys[id(over.sites[name].parameter)]: matrix for name, matrix in matrices.items()}
        losses: list[Tensor] = []
        for batch in range(MICRO_BATCHES):
            x, y = (t.to(DEVICE) for t in net_batch(MICRO_BATCHES * step + batch, dtype=torch.float64))
            losses.append((functional_call(model, weights, (x,)) - y).square().mean())
        loss = torch.stack(losses).mean()
        if case.clipped:
            pulled = torch.autograd.grad(loss, list(matrices.values()), retain_graph=True)
            norm = torch.cat([gradient.flatten() for gradient in pulled]).norm()
            assert norm > MAX_NORM
            loss = loss * (MAX_NORM / (norm + 1e-6))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        for name in cores:
            history[name].append(contract(name).detach())
    return {name: torch.stack(matrices) for name, matrices in history.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_beside_the_optimizer_equals_autograd_through_the_cores(case: Case) -> None:
    ours = beside(case)
    assert all((matrices[-1] - matrices[0]).abs().max() > 1e-3 for matrices in ours.values())
    assert deviation(ours, through(replace(case, closure=False))) < TOLERANCE


def test_in_the_identity_gauge_with_auxiliary_cores_at_rest_it_is_plain_lora_bit_for_bit() -> None:
    options = {"num_cores": 3, "gauge": "identity"}
    plain, model = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64)
    over = OverParameterization(model, LoraOverConfig(options=options, aux_lr_scale=0))
    optimizers = [OPTIMIZERS["adamw"](trainable(net)) for net in (plain, model)]
    over.attach(optimizers[1])
    for step in range(STEPS):
        for net, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            net_loss(net, step).backward()
            optimizer.step()
        assert all(torch.equal(*pair) for pair in zip(trainable(plain), trainable(model), strict=True))
