"""Stacks of cores as the optimizer sees them: together, or each site by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from loraover import OverParameterization
from loraover.overparam.decompositions import DECOMPOSITIONS
from loraover.overparam.optimizers import ELEMENTWISE

from strategies import normal
from support.hooked_run import core_states, make, same, train
from support.optimizers import adagrad, adamw_8bit, muon
from support.tiny_models import lora_matrices, net_loss

STEPS = 6

ALL: dict[str, Callable[[Any], Any]] = {
    "Adadelta": torch.optim.Adadelta,
    "Adagrad": lambda p: adagrad(p, lr=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "Adamax": torch.optim.Adamax,
    "AdamW": lambda p: AdamW(p, lr=1e-2),
    "AdamW-foreach": lambda p: AdamW(p, lr=1e-2, foreach=True),
    "AdamW-fused": lambda p: AdamW(p, lr=1e-2, fused=True),
    "ASGD": torch.optim.ASGD,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.5),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.1),
}
DECOMPOSED: dict[str, dict[str, Any]] = {
    "mpo": {"decomposition": "mpo"},
    "eigen": {"decomposition": "eigen", "options": {"block": 3}},
}
by_decomposition = pytest.mark.parametrize("decomposition", DECOMPOSED)


# Whole stacks, and each site by itself


def split(over: OverParameterization) -> None:
    """Show each site's cores to the optimizer by themselves, as to one that is not elementwise."""
    for group in over.groups:
        group.split()


def test_every_elementwise_optimizer_is_tried() -> None:
    assert {kind.__name__ for kind in ELEMENTWISE} == {name.partition("-")[0] for name in ALL}


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_a_gradient_lies_in_memory_as_its_core_does(decomposition: str) -> None:
    """Fused optimizers pair numbers by their place in memory, and not by their index."""
    model, over, optimizer = make(decomposition=decomposition)
    seen = []

    def watch(*_: Any) -> None:
        for parameter in (p for group in over.groups for k in group.trained for p in group.parameters(k)):
            assert parameter.grad is not None
            seen.append((parameter.grad.stride(), parameter.stride()))

    optimizer.register_step_pre_hook(watch)
    train(model, optimizer, range(3))
    assert seen
    assert all(gradient == core for gradient, core in seen)


@by_decomposition
@pytest.mark.parametrize("name", ALL)
def test_whole_stacks_train_as_each_site_by_itself(name: str, decomposition: str) -> None:
    model, over, optimizer = make(ALL[name], **DECOMPOSED[decomposition])
    together = train(model, optimizer, range(STEPS))
    assert all(group.is_joined for group in over.groups)
    assert max(len(group.sites) for group in over.groups) == 2

    other, apart, optimizer = make(ALL[name], **DECOMPOSED[decomposition])
    split(apart)
    alone = train(other, optimizer, range(STEPS))
    assert not any(group.is_joined for group in apart.groups)
    # A fused optimizer fuses a multiplication and an addition where a vector of numbers is full, and rounds twice in
    # the rest: some three roundings of 2^-24 in each of six steps, of numbers below one.
    tolerance = 3 * STEPS * 2**-24 if name == "AdamW-fused" else 0.0
    assert all((matrix - alone[key]).abs().max() <= tolerance for key, matrix in together.items())
    assert tolerance or same(core_states(over), core_states(apart))


@by_decomposition
@pytest.mark.parametrize("build", [muon, adamw_8bit], ids=["muon", "adamw-8bit"])
def test_an_optimizer_of_whole_matrices_sees_each_site(build: Callable[[Any], Any], decomposition: str) -> None:
    _, over, _ = make(build, **DECOMPOSED[decomposition])
    assert not any(group.is_joined for group in over.groups)


def test_a_subclass_of_an_elementwise_optimizer_may_do_anything_and_sees_each_site() -> None:
    _, over, _ = make(type("Mine", (AdamW,), {}))
    assert not any(group.is_joined for group in over.groups)


def step_without(model: Any, optimizer: Any, number: int, names: set[str]) -> None:
    """A step in which some sites have no gradient."""
    optimizer.zero_grad()
    net_loss(model, number).backward()
    for key, parameter in model.named_parameters():
        if any(name in key for name in names):
            parameter.grad = None
    optimizer.step()


@by_decomposition
def test_a_site_without_a_gradient_is_skipped_and_splits_its_group(decomposition: str) -> None:
    model, over, optimizer = make(lambda p: AdamW(p, lr=1e-2, weight_decay=0.5), **DECOMPOSED[decomposition])
    train(model, optimizer, range(2))
    before, states = lora_matrices(model), {name: over.injected[name] for name in ("second.lora_A", "third.lora_A")}
    step_without(model, optimizer, 2, {"second.lora_A"})
    after = lora_matrices(model)
    # A refresh rewrites also what has no gradient, up to rounding; decay alone would move it by 0.5 %.
    unmoved = [key for key, matrix in after.items() if (matrix - before[key]).abs().max() < 1e-6]
    assert len(unmoved) == 1
    assert "second.lora_A" in unmoved[0]
    group, i = states["second.lora_A"]
    other, j = states["third.lora_A"]
    assert group is other
    assert not group.is_joined
    assert [float(group.core_state(group.centre, k)["step"]) for k in (i, j)] == [2.0, 3.0]
    assert sum(group.is_joined for group in over.groups) == len(over.groups) - 1
    train(model, optimizer, range(3, 5))
    assert not any(torch.equal(matrix, after[key]) for key, matrix in lora_matrices(model).items())
    over.finish()


def test_a_group_whose_every_site_lacks_a_gradient_stays_together_and_at_rest() -> None:
    model, over, optimizer = make()
    train(model, optimizer, range(2))
    before = lora_matrices(model)
    step_without(model, optimizer, 2, {"lora_A"})
    unmoved = {key for key, matrix in lora_matrices(model).items() if torch.equal(matrix, before[key])}
    assert unmoved == {key for key in before if "lora_A" in key}
    assert all(group.is_joined for group in over.groups)


@by_decomposition
def test_a_split_group_trains_as_if_it_had_never_been_whole(decomposition: str) -> None:
    def trained(*, is_whole: bool) -> dict[str, Tensor]:
        model, over, optimizer = make(**DECOMPOSED[decomposition])
        if not is_whole:
            split(over)
        train(model, optimizer, range(2))
        step_without(model, optimizer, 2, {"second.lora_A", "first.lora_B"})
        return train(model, optimizer, range(3, 6))

    assert same(trained(is_whole=True), trained(is_whole=False))


# Cores that are renewed


def test_renewed_cores_keep_their_bases_and_take_up_the_matrix() -> None:
    model, over, optimizer = make(decomposition="eigen", options={"block": 3})
    train(model, optimizer, range(6))
    group, i = over.injected["second.lora_B"]
    bases = [stack.clone() for k, stack in enumerate(group.stacks) if k != group.centre]
    target = normal(3, *group.shape).float()
    over.sites["second.lora_B"].parameter.data.copy_(target)
    over.adopt_matrices()
    assert same([stack for k, stack in enumerate(group.stacks) if k != group.centre], bases)
    assert (group.contract()[i] - target).abs().max() < 1e-5
    assert group.core_state(group.centre, i) == {}
    train(model, optimizer, range(6, 9))
    over.finish()
