"""Sites get cores during a run, keep them to its end, and lose them with `finish`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LinearLR

from loraover import LoraOverConfig, OverParameterization
from loraover.checkpoint.error_bounds import gamma
from loraover.common.errors import ConfigError

from support.hooked_run import assert_contracted, cores, make, same, train
from support.tiny_models import lora_matrices, net_batch, net_loss, tiny_net, trainable

# Injection during a run


def test_injection_during_a_run_keeps_the_function() -> None:
    model, over, optimizer = make(sites=["first.*"])
    train(model, optimizer, range(4))
    x, _ = net_batch(9)
    before, outputs, states = lora_matrices(model), model(x), len(optimizer.state)
    over.inject(["second.lora_A", "third.lora_B"], step=4)
    for name in ("second.lora_A", "third.lora_B"):
        group, i = over.injected[name]
        terms = over.decomposition.contraction_terms(*group.shape)
        sizes = [core[i : i + 1].abs().double() for core in group.stacks]
        # Each core is rounded to float32 once before the contraction rounds.
        bound = gamma(terms + len(sizes), 2**-24) * over.decomposition.contract(sizes, *group.shape)[0]
        key = next(key for key in before if name in key.replace(".default", ""))
        assert ((over.sites[name].parameter - before[key]).abs() <= bound).all()
        assert group.step == 4
    # The largest bound is 1e-6, the layer after it sums 8 terms.
    torch.testing.assert_close(model(x), outputs, rtol=0, atol=8e-6)
    assert len(optimizer.state) == states - 2

    injected = lora_matrices(model)
    after = train(model, optimizer, range(4, 8))
    assert not any(torch.equal(injected[key], after[key]) for key in after)
    assert_contracted(over)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["second.lora_A", "nowhere.lora_A"], "no such site: nowhere"),
        (["second.lora_A", "first.lora_A"], r"already over-parameterised: first\.lora_A"),
        (["second.lora_A", "second.lora_A"], r"already over-parameterised: second\.lora_A"),
    ],
)
def test_a_refused_injection_changes_nothing(names: list[str], message: str) -> None:
    model, over, optimizer = make(sites=["first.*"])
    train(model, optimizer, range(2))
    before, injected = lora_matrices(model), over.injected
    with pytest.raises(ConfigError, match=message):
        over.inject(names)
    assert over.injected == injected
    assert same(lora_matrices(model), before)


def test_injecting_a_site_that_the_optimizer_lacks_changes_nothing() -> None:
    model = tiny_net()
    over = OverParameterization(model, LoraOverConfig(sites=["first.*"]))
    optimizer = SGD(trainable(model)[:-1], lr=0.1, momentum=0.9)
    over.attach(optimizer)
    train(model, optimizer, range(2))
    before, injected, states = lora_matrices(model), over.injected, len(optimizer.state)
    with pytest.raises(ConfigError, match=r"does not hold third\.lora_B"):
        over.inject(["second.lora_A", "third.lora_B"])
    assert over.injected == injected
    assert same(lora_matrices(model), before)
    assert len(optimizer.state) == states
    after = train(model, optimizer, range(2, 4))
    assert {key for key in after if torch.equal(after[key], before[key])} == {list(after)[-1]}


# End of a run


def test_finish_leaves_a_plain_model_and_optimizer() -> None:
    model, over, optimizer = make()
    parameters = [id(p) for p in model.parameters()]
    train(model, optimizer, range(3))
    before, trained = lora_matrices(model), cores(over)
    over.finish()
    assert same(lora_matrices(model), before)
    assert [id(p) for p in model.parameters()] == parameters
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in trainable(model)]
    assert over.optimizer is None

    plain = tiny_net()
    with torch.no_grad():
        for one, other in zip(trainable(plain), trainable(model), strict=True):
            one.copy_(other)
    plain_optimizer = AdamW(trainable(plain), lr=1e-2)
    assert same(train(model, optimizer, range(3, 6)), train(plain, plain_optimizer, range(3, 6)))
    assert same(cores(over), trained)
    over.finish()


def raise_in_closure(optimizer: Optimizer) -> None:
    def broken() -> float:
        raise KeyboardInterrupt

    optimizer.step(broken)


def raise_in_optimizer(optimizer: Optimizer) -> None:
    """As memory may run out while the optimizer makes its state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "_init_group", Mock(side_effect=KeyboardInterrupt))
        optimizer.step()


def raise_in_hook(optimizer: Optimizer) -> None:
    hook = optimizer.register_step_pre_hook(Mock(side_effect=KeyboardInterrupt))
    try:
        optimizer.step()
    finally:
        hook.remove()


def trained(
    broken: Callable[[Optimizer], None] | None, scheduled: str
) -> tuple[Any, OverParameterization, Optimizer, dict[str, Tensor]]:
    """Two steps, one more that is broken, and another, with its matrices."""
    model = tiny_net()
    optimizer = AdamW(trainable(model), lr=1e-2)
    over = OverParameterization(model)
    scheduler = LinearLR(optimizer) if scheduled == "before" else None
    over.attach(optimizer)
    scheduler = scheduler or LinearLR(optimizer)
    for number in range(2):
        train(model, optimizer, range(number, number + 1))
        scheduler.step()
    if broken is not None:
        net_loss(model, 2).backward()
        with pytest.raises(KeyboardInterrupt):
            broken(optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [6]
    assert not optimizer.state
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0})
    return model, over, optimizer, train(model, optimizer, range(3, 4))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scheduled", ["before", "after"])
@pytest.mark.parametrize("broken", [raise_in_closure, raise_in_optimizer, raise_in_hook])
def test_a_step_that_raised_leaves_a_plain_optimizer(broken: Callable[[Optimizer], None], scheduled: str) -> None:
    """And no trace in the next step."""
    model, over, optimizer, matrices = trained(broken, scheduled)
    assert same(matrices, trained(None, scheduled)[3])
    over.finish()
    assert [len(group["params"]) for group in optimizer.param_groups] == [6, 1]
    after = train(model, optimizer, range(4, 5))
    assert all(optimizer.state[parameter] for parameter in trainable(model))
    assert not same(after, matrices)


# Seeds


def test_the_seed_and_the_name_decide_the_cores() -> None:
    def drawn(seed: int | None, sites: str = "*") -> dict[str, list[Tensor]]:
        over = OverParameterization(tiny_net(), LoraOverConfig(options={"gauge": "random"}, seed=seed, sites=[sites]))
        return {name: [stack[i] for stack in group.stacks] for name, (group, i) in over.injected.items()}

    one = drawn(1)
    torch.rand(1)
    assert same(one, drawn(1))
    assert same(drawn(None), drawn(0))
    assert same(drawn(1, "third.lora_A")["third.lora_A"], one["third.lora_A"])
    other = drawn(2)
    assert not any(same(one[name], other[name]) for name in one)
    assert not same(one["second.lora_A"][0], one["third.lora_A"][0])
