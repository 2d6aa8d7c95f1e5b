"""Between steps, optimizer and gradients look like plain LoRA's; some steps must change nothing."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer

from loraover import LoraOverConfig, OverParameterization
from loraover.checkpoint.error_bounds import gamma

from support.hooked_run import OPTIMIZERS, core_states, cores, make, ordinary_step, same, train
from support.tiny_models import lora_matrices, net_loss, tiny_net, trainable

# What is visible between steps


def visible(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{**group, "params": len(group["params"])} for group in optimizer.param_groups]


@pytest.mark.parametrize("named", [False, True])
def test_between_steps_the_optimizer_looks_plain(named: bool) -> None:
    def build(model: Any) -> AdamW:
        chosen = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return AdamW(chosen if named else [p for _, p in chosen], lr=1e-2, weight_decay=0.1)

    plain_model, model = tiny_net(), tiny_net()
    plain, optimizer = build(plain_model), build(model)
    OverParameterization(model, LoraOverConfig(sites=["*lora_A"])).attach(optimizer)
    for step in range(3):
        assert visible(optimizer) == visible(plain)
        assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in trainable(model)]
        assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
        held, expected = ({i: set(state) for i, state in o.state_dict()["state"].items()} for o in (optimizer, plain))
        assert held == expected
        assert not any(matrix in optimizer.state for matrix in trainable(model)[::2])  # every second one is a B
        for pair in ((plain_model, plain), (model, optimizer)):
            ordinary_step(*pair, step)


def test_the_gradients_between_steps_are_plain_loras() -> None:
    plain, model = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64)
    over = OverParameterization(model).attach(SGD(trainable(model), lr=0.1))
    for target in (plain, model):
        for batch in range(3):
            net_loss(target, batch).backward()
    for one, other in zip(trainable(model), trainable(plain), strict=True):
        assert one.grad is not None
        # The injected matrices differ from the plain ones by some 30 roundings; three layers of width 8, with
        # weights below 1, let that grow by less than 8**3.
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=8**3 * gamma(30, 2**-53))
    assert all(p.grad is None for group in over.groups for k in group.trained for p in group.parameters(k))


@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "sgd-nesterov", "adagrad", "adafactor", "adamw-8bit"])
def test_a_state_dict_round_trip_changes_nothing(name: str) -> None:
    def trained(round_trip: bool) -> dict[str, Tensor]:
        model, _, optimizer = make(OPTIMIZERS[name], sites=["*lora_B", "third.*"])
        train(model, optimizer, range(3))
        if round_trip:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return train(model, optimizer, range(3, 6))

    assert same(trained(round_trip=True), trained(round_trip=False))


@pytest.mark.parametrize("steps_between", [1, 3])
def test_either_zero_grad_gives_the_same_run(steps_between: int) -> None:
    def trained(set_to_none: bool) -> dict[str, Tensor]:
        def step(model: Any, optimizer: Optimizer, number: int) -> None:
            for batch in range(steps_between):
                net_loss(model, number * steps_between + batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)

        model, _, optimizer = make()
        return train(model, optimizer, range(4), step)

    assert same(trained(True), trained(False))


def test_gradients_left_on_the_cores_are_not_used_twice() -> None:
    model, over, optimizer = make(lambda p: SGD(p, lr=0.1))
    net_loss(model, 0).backward()
    optimizer.step()
    before = cores(over)
    optimizer.step()
    assert same(cores(over), before)


# Steps that must change nothing


@pytest.mark.parametrize(
    ("fused", "unscale", "bad"), [(False, False, 0), (False, True, 2), (True, False, 2), (True, True, 0)]
)
def test_a_step_skipped_for_infinity_changes_nothing(fused: bool, unscale: bool, bad: int) -> None:
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)

    def step(model: Any, optimizer: Optimizer, number: int, *, overflow: bool = False) -> None:
        optimizer.zero_grad()
        scaler.scale(net_loss(model, number)).backward()
        if overflow:
            gradient = trainable(model)[-1].grad
            assert gradient is not None
            gradient[0, 0] = math.inf
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trainable(model), 1.0)
        scaler.step(optimizer)
        scaler.update()

    def build(p: list[nn.Parameter]) -> AdamW:
        return AdamW(p, lr=1e-2, fused=fused, foreach=False if not fused else None)

    model, over, optimizer = make(build)
    train(model, optimizer, range(bad), step)
    before = lora_matrices(model), cores(over), core_states(over)
    step(model, optimizer, bad, overflow=True)
    assert scaler.get_scale() == 2.0**9
    assert same(lora_matrices(model), before[0])
    assert same(cores(over), before[1])
    moments = [{key: value for key, value in state.items() if torch.any(value != 0)} for state in core_states(over)]
    assert same(moments, [dict(state) for state in before[2]])

    # A power of two scales exactly, so the run goes on as if there had been no bad step.
    resumed = train(model, optimizer, range(bad, 4), step)
    good_model, _, good_optimizer = make(build)
    assert same(resumed, train(good_model, good_optimizer, range(4), step))
    assert not same(resumed, before[0])


@pytest.mark.parametrize("decay_auxiliary", [False, True])
def test_weight_decay_shrinks_the_centre_alone_unless_asked(decay_auxiliary: bool) -> None:
    model, over, optimizer = make(lambda p: AdamW(p, lr=0.1, weight_decay=0.5), decay_auxiliary=decay_auxiliary)
    before = {name: site.parameter.detach().clone() for name, site in over.sites.items()}
    for parameter in trainable(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, (group, _) in over.injected.items():
        shrunk = 0.95 ** (len(group.stacks) if decay_auxiliary else 1)
        bound = 2 * gamma(over.decomposition.contraction_terms(*group.shape), 2**-24)
        torch.testing.assert_close(over.sites[name].parameter, before[name] * shrunk, rtol=0, atol=bound)
