"""Eigen with input and with optimizers that it cannot use: refused, warned of, or without effect on its statistics."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from loraover import Budget, LoraOverConfig, OverParameterization, Probe
from loraover.overparam.decompositions import Eigen
from loraover.overparam.optimizers import BLIND

from support.hooked_run import make, ordinary_step, same, train
from support.optimizers import adamw_8bit, muon
from support.precision import restore_default_precision
from support.tiny_models import lora_matrices, net_loss, tiny_net, trainable, with_lora


def test_trained_bases_count_in_a_budget_of_parameters() -> None:
    model = tiny_net()
    options = {"short": "calibration", "long": "calibration", "train_auxiliary": True}
    config = LoraOverConfig(
        decomposition="eigen", options=options, schedule="static", budget=Budget(parameters=100), quota="global"
    )
    over = OverParameterization(model, config, probe=Probe(model, [0, 1], net_loss))
    cores, matrices = over.num_parameters()
    assert 0 < cores - matrices <= 100


# Gradients that are not finite


def moments(over: OverParameterization) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, (group, i) in over.injected.items()
        for key, value in over.followers[group].site_state(i).items()
        if key != "counts"
    } | {f"{name}.seen": over.followers[group].seen[i].clone() for name, (group, i) in over.injected.items()}


def auxiliary(over: OverParameterization) -> list[Tensor]:
    """Copies of the bases."""
    return [stack.clone() for group in over.groups for k, stack in enumerate(group.stacks) if k != group.centre]


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("everywhere", [True, False], ids=["everywhere", "in-one-site"])
def test_gradients_that_are_not_finite_count_for_nothing(value: float, everywhere: bool) -> None:
    model, over, optimizer = make(decomposition="eigen", options={"refresh": 100})
    train(model, optimizer, range(3))
    before = moments(over), auxiliary(over)
    chosen = trainable(model) if everywhere else trainable(model)[:1]
    net_loss(model, 3).backward()
    for parameter in chosen:
        assert parameter.grad is not None
        parameter.grad[0, 0] = value
    optimizer.step()
    assert same([moments(over), auxiliary(over)], list(before))
    assert all(bool(value.isfinite().all()) for value in moments(over).values())


@pytest.mark.parametrize("gradient", [torch.nan, 0.0], ids=str)
def test_a_refresh_after_such_a_step_keeps_bases_orthogonal(gradient: float) -> None:
    """Also where nothing has been seen yet."""
    model, over, optimizer = make(lambda p: SGD(p, lr=0.0), decomposition="eigen", options={"growth": 1, "block": 3})
    for step in range(4):
        ordinary_step(model, optimizer, step) if step == 2 else None
        for parameter in trainable(model):
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    eigen = over.decomposition
    assert isinstance(eigen, Eigen)
    for group in over.groups:
        cores = [stack.double() for stack in group.stacks]
        assert eigen.bases.departure(cores, *group.shape) < 1e-5


@pytest.mark.parametrize("gradient", [torch.nan, 0.0], ids=str)
def test_such_a_step_does_not_bring_a_refresh_nearer(gradient: float) -> None:
    options = {"refresh": 3, "growth": 1}
    model, over, optimizer = make(lambda p: SGD(p, lr=0.0), decomposition="eigen", options=options)
    start = auxiliary(over)
    train(model, optimizer, range(2))
    centres = [group.stacks[group.centre].clone() for group in over.groups]
    for parameter in trainable(model):
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    assert same(auxiliary(over), start)
    with torch.no_grad():
        for group, centre in zip(over.groups, centres, strict=True):
            group.stacks[group.centre].copy_(centre)
            group.write()
    train(model, optimizer, range(2, 3))
    assert not same(auxiliary(over), start)


def test_a_step_that_a_fused_optimizer_skips_counts_for_nothing() -> None:
    model, over, optimizer = make(lambda p: AdamW(p, lr=1e-2, fused=True), decomposition="eigen")
    train(model, optimizer, range(3))
    before, steps = moments(over), [follower.steps for follower in over.followers.values()]
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
    ordinary_step(model, optimizer, 3)
    del optimizer.grad_scale, optimizer.found_inf
    assert same(moments(over), before)
    assert [follower.steps for follower in over.followers.values()] == steps


def test_a_closure_that_is_called_twice_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(AdamW):
        def step(self, closure: Any = None) -> Any:
            closure()
            return super().step(closure)

    monkeypatch.setattr("loraover.overparam.eigenbases.ROTATED", (AdamW, Twice))

    def run(kind: Any, closure: bool) -> dict[str, Tensor]:
        model, over, optimizer = make(lambda p: kind(p, lr=0.0), decomposition="eigen")
        for step in range(3):

            def evaluate(step: int = step) -> float:
                optimizer.zero_grad()
                loss = net_loss(model, step)
                loss.backward()
                return float(loss.detach())

            optimizer.step(evaluate) if closure else (evaluate(), optimizer.step())
        return {key: value for key, value in moments(over).items() if ".seen" in key or ".moment" in key}

    once, twice = run(AdamW, closure=False), run(Twice, closure=True)
    assert same(once, twice)
    assert all(int(value) == 3 for key, value in twice.items() if ".seen" in key)


# Optimizers


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, logger="loraover")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "loraover"]


class MomentumInState1(Optimizer):
    """Keeps its momentum as bitsandbytes does, under a name that is not PyTorch's."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    momentum = self.state[parameter].setdefault("state1", torch.zeros_like(parameter))
                    parameter.sub_(momentum.mul_(0.9).add_(parameter.grad), alpha=group["lr"])


FIXED: dict[str, Callable[[Any], Any]] = {
    "AdamW8bit": adamw_8bit,
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "SGD": lambda p: type("SGD", (MomentumInState1,), {})(p),
    "Mine": lambda p: type("Mine", (AdamW,), {})(p, lr=1e-2),
}
BLIND_ONES: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda p: SGD(p, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Muon": lambda p: muon(p, lr=1e-2),
}


def test_the_table_of_blind_optimizers_is_complete() -> None:
    assert {kind.__name__ for kind in BLIND} == {name for name in BLIND_ONES if name in vars(torch.optim)}


@pytest.mark.parametrize("name", FIXED)
def test_bases_stay_and_a_warning_says_so_where_the_state_cannot(name: str, warned: Callable[[], list[str]]) -> None:
    model, over, optimizer = make(FIXED[name], decomposition="eigen", options={"growth": 1})
    (message,) = warned()
    assert message.startswith(f"{name} keeps state that cannot be turned into another basis, so bases do not follow")
    before = auxiliary(over)
    train(model, optimizer, range(4))
    assert same(auxiliary(over), before)
    over.finish()


def test_measured_bases_need_no_turning(warned: Callable[[], list[str]]) -> None:
    model = tiny_net()
    options = {"short": "calibration", "long": "calibration"}
    config = LoraOverConfig(decomposition="eigen", options=options)
    over = OverParameterization(model, config, probe=Probe(model, [0, 1], net_loss))
    over.attach(optimizer := FIXED["Adafactor"](trainable(model)))
    train(model, optimizer, range(2))
    assert warned() == []


def test_a_later_round_stops_its_bases_as_well(warned: Callable[[], list[str]]) -> None:
    """Those that get cores once the optimizer is attached."""
    model = tiny_net()
    config = LoraOverConfig(decomposition="eigen", options={"growth": 1}, sites=["first.*"])
    over = OverParameterization(model, config)
    over.attach(optimizer := FIXED["Adafactor"](trainable(model)))
    train(model, optimizer, range(2))
    over.inject(["second.lora_A", "second.lora_B", "third.lora_B"], step=2)
    assert len(warned()) == 2
    before = auxiliary(over)
    train(model, optimizer, range(2, 5))
    assert same(auxiliary(over), before)


@pytest.mark.parametrize("name", BLIND_ONES)
def test_an_optimizer_that_every_basis_is_alike_to_is_warned_of(name: str, warned: Callable[[], list[str]]) -> None:
    model, _, optimizer = make(BLIND_ONES[name], decomposition="eigen", options={"growth": 1})
    assert warned() == [f"{name} takes the same step in every basis, so decomposition eigen changes nothing with it"]
    matrices = train(model, optimizer, range(5))
    plain, _, other = make(BLIND_ONES[name], decomposition="eigen", options={"short": "none", "long": "none"})
    expected = train(plain, other, range(5))
    # Rotated to and fro in float32; Muon's products are of bfloat16.
    tolerance = 1e-5 if name == "SGD" else 2e-2
    assert all((matrix - expected[key]).abs().max() < tolerance for key, matrix in matrices.items())


# Precision of a turn


def test_a_turn_is_made_in_full_precision() -> None:
    """However low a precision is asked for, and under autocast: Z is turned, and M must stay what it is."""

    def run(*, lower: bool) -> dict[str, Tensor]:
        if lower:
            torch.set_float32_matmul_precision("medium")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(256, 256))
        model = with_lora(net, target_modules=["0"], r=64)
        config = LoraOverConfig(decomposition="eigen", options={"growth": 1})
        optimizer = AdamW(trainable(model), lr=1e-3)
        over = OverParameterization(model, config).attach(optimizer)
        for step in range(5):
            for i, parameter in enumerate(trainable(model)):
                generator = torch.Generator().manual_seed(10 * step + i)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=lower):
                optimizer.step()
        trainable(model)[0].data.mul_(2)
        assert over.adopt_matrices()
        return lora_matrices(model)

    expected = run(lower=False)
    try:
        found = run(lower=True)
    finally:
        restore_default_precision()
    assert same(found, expected)
