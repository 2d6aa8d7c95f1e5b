"""Ordinary optimizers, schedulers and users' own steps train the cores; others are refused by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, OneCycleLR, ReduceLROnPlateau

from loraover import OverParameterization
from loraover.common.errors import ConfigError

from support.hooked_run import OPTIMIZERS, assert_contracted, cores, make, ordinary_step, same, train
from support.tiny_models import lora_matrices, net_loss, tiny_net, trainable

# Optimizers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_ordinary_optimizer_trains_the_cores(name: str) -> None:
    model, over, optimizer = make(OPTIMIZERS[name])
    before, first = lora_matrices(model), net_loss(model, 0).item()

    def step(model: Any, optimizer: Optimizer, _: int) -> None:
        ordinary_step(model, optimizer, 0)

    after = train(model, optimizer, range(20), step)
    assert net_loss(model, 0).item() < first
    assert not any(torch.equal(before[key], after[key]) for key in before)
    assert_contracted(over)
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(before)]


# Schedulers


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "linear": lambda o: LinearLR(o, start_factor=0.1, total_iters=4),
    "one-cycle": lambda o: OneCycleLR(o, max_lr=1e-2, total_steps=10),
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=1, factor=0.5),
}


def scheduled_rates(name: str, over_from: str | None) -> list[list[float]]:
    """The rates and momenta after each step, with over-parameterisation attached "before" or "after"."""
    model = tiny_net()
    a, b = trainable(model)[::2], trainable(model)[1::2]
    optimizer = AdamW([{"params": a, "lr": 1e-2}, {"params": b, "lr": 3e-2}])
    over = OverParameterization(model) if over_from is not None else None
    if over is not None and over_from == "before":
        over.attach(optimizer)
    scheduler = SCHEDULERS[name](optimizer)
    if over is not None and over_from == "after":
        over.attach(optimizer)
    rates = []
    for step in range(8):
        ordinary_step(model, optimizer, step)
        scheduler.step(*([1.0] if name == "plateau" else []))
        rates.append([value for group in optimizer.param_groups for value in (group["lr"], *group["betas"])])
    return rates


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("attached", ["before", "after"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_see_a_plain_lora(name: str, attached: str) -> None:
    plain = scheduled_rates(name, None)
    assert len({rates[0] for rates in plain}) > 1
    assert scheduled_rates(name, attached) == plain


@pytest.mark.parametrize("attach_first", [True, False])
def test_the_cores_follow_the_scheduled_rate(attach_first: bool) -> None:
    model = tiny_net()
    over, optimizer = OverParameterization(model), AdamW(trainable(model), lr=1e-2)
    if attach_first:
        over.attach(optimizer)
    scheduler = LambdaLR(optimizer, lambda step: float(step < 2))
    if not attach_first:
        over.attach(optimizer)
    history = [cores(over)]
    for step in range(4):
        ordinary_step(model, optimizer, step)
        scheduler.step()
        history.append(cores(over))
    assert [same(one, other) for one, other in pairwise(history)] == [False, False, True, True]


# Refusals


class PatientLBFGS(torch.optim.LBFGS):
    """A user's subclass."""


def _cpu_adam(parameters: list[nn.Parameter]) -> Any:
    """As Accelerate wraps it; DeepSpeed's own class compiles C++ when it is made."""
    wrapper = DeepSpeedOptimizerWrapper.__new__(DeepSpeedOptimizerWrapper)
    wrapper.optimizer = type("DeepSpeedCPUAdam", (SGD,), {"__module__": "deepspeed.ops.adam.cpu_adam"})(parameters)
    return wrapper


def test_adagrad_of_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    with pytest.raises(ConfigError, match=r"Adagrad of torch 2\.11\.0 .* upgrade to torch 2\.12"):
        make(lambda parameters: torch.optim.Adagrad(parameters))


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (torch.optim.LBFGS, "LBFGS"),
        (PatientLBFGS, "LBFGS"),
        (_cpu_adam, "DeepSpeedCPUAdam is DeepSpeed's own optimizer"),
        (lambda parameters: parameters, r"builtins\.list"),
    ],
    ids=["lbfgs", "lbfgs-subclass", "deepspeed", "list"],
)
def test_an_optimizer_with_another_kind_of_step_is_refused_by_name(
    build: Callable[[list[nn.Parameter]], Any], named: str
) -> None:
    model = tiny_net()
    over = OverParameterization(model)
    with pytest.raises(ConfigError, match=named):
        over.attach(build(trainable(model)))
    assert over.optimizer is None


@pytest.mark.parametrize(
    "name", ["ScheduleFreeAdamW", "ScheduleFreeRAdam", "ScheduleFreeSGD", "ScheduleFreeWrapper", "SPlus"]
)
def test_averaging_optimizers_of_pytorch_optimizer_are_refused(name: str) -> None:
    library = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    kind: Any = getattr(library, name)
    model = tiny_net()
    optimizer = kind(AdamW(trainable(model))) if name.endswith("Wrapper") else kind(trainable(model))
    with pytest.raises(ConfigError, match=f"{name} cannot be used: its train and eval modes"):
        OverParameterization(model).attach(optimizer)


class Sharp(SGD):
    """Sharpness-aware minimisation: a step up by the gradients of before, and one down by those found there."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        ups = [0.1 * p.grad for p in held]
        torch._foreach_add_(held, ups)
        with torch.enable_grad():
            loss = closure()
        torch._foreach_sub_(held, ups)
        super().step()
        return loss


class Slow(Optimizer):
    """Lookahead: the base optimizer's steps, and every second step halfway back to the parameters of before."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        super().__init__(base.param_groups, {})
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.base.step()
        for p, slow in zip((p for g in self.param_groups for p in g["params"]), self.slow, strict=True):
            if p.grad is not None:
                slow.lerp_(p, 0.5)
                p.copy_(slow)


class Measuring(SGD):
    """SGD at a rate that its last step has computed from each parameter group, as AvaGrad does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step()
        for group in self.param_groups:
            group["gamma"] = sum(float(p.grad.norm()) for p in group["params"] if p.grad is not None)


def _first_step(build: Callable[[list[nn.Parameter]], Any]) -> None:
    """Take a step as sharpness-aware optimizers ask for it: with gradients, and with a closure."""
    model, _, optimizer = make(build)
    net_loss(model).backward()

    def evaluate() -> Any:
        optimizer.zero_grad()
        (loss := net_loss(model)).backward()
        return loss

    optimizer.step(evaluate)


def _library(name: str) -> Any:
    library = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    return getattr(library, name)


AROUND = "it changes parameters before or after the steps of another optimizer"


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (Sharp, "Sharp cannot be used: its step moves the parameters by gradients from before the step"),
        (Measuring, "Measuring cannot be used: its step computes 'gamma' of a parameter group"),
        (lambda p: _library("AvaGrad")(p), "AvaGrad cannot be used: its step computes 'gamma' of a parameter group"),
        (lambda p: Slow(SGD(p, 0.1)), f"Slow cannot be used: {AROUND} .SGD."),
        (lambda p: _library("SAM")(p, base_optimizer=SGD, lr=0.1), f"SAM cannot be used: {AROUND} .SGD."),
        (lambda p: _library("Lookahead")(SGD(p, 0.1)), f"Lookahead cannot be used: {AROUND} .SGD."),
    ],
    ids=["sharp", "measuring", "avagrad", "slow", "sam", "lookahead"],
)
def test_an_optimizer_that_cores_would_switch_off_is_refused_by_what_it_does(build: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        _first_step(build)


@pytest.mark.parametrize("wrap", [Slow, lambda base: _library("Lookahead")(base)], ids=["slow", "lookahead"])
def test_a_wrapper_around_the_attached_optimizer_is_refused(wrap: Any) -> None:
    model, _, optimizer = make()
    wrapper = wrap(optimizer)
    net_loss(model).backward()
    with pytest.raises(ConfigError, match=f"{type(wrapper).__name__} cannot be used: {AROUND} .AdamW."):
        wrapper.step()


def test_a_wrapper_that_only_passes_steps_on_trains_the_same() -> None:
    def trained(wrap: Callable[[Any], Any]) -> dict[str, Tensor]:
        model, _, optimizer = make(lambda p: wrap(AdamW(p, lr=1e-2)))
        return train(model, optimizer, range(3))

    assert same(trained(_library("PCGrad")), trained(lambda optimizer: optimizer))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_attached_optimizer_is_not_copied_without_its_cores(copied: Callable[[Any], Any]) -> None:
    model, over, optimizer = make()
    with pytest.raises(ConfigError, match=r"AdamW trains cores.* Copy or save its state_dict\(\)"):
        copied([optimizer, model] if copied is copy.deepcopy else optimizer)
    over.finish()
    copied(optimizer)


def test_a_second_attach_is_refused() -> None:
    _, over, optimizer = make()
    with pytest.raises(ConfigError, match="attached already"):
        over.attach(optimizer)


# Steps written by users


class LookTwice(Optimizer):
    """Two plain gradient steps in one, each with an evaluation of its own."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for _ in range(2):
            with torch.enable_grad():
                closure()
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.add_(parameter.grad, alpha=-group["lr"])


def test_every_evaluation_of_a_step_sees_the_current_cores() -> None:
    def trained(build: Callable[[list[nn.Parameter]], Optimizer], steps: int) -> dict[str, Tensor]:
        model, _, optimizer = make(build)

        def evaluate() -> Any:
            optimizer.zero_grad()
            loss = net_loss(model)
            torch.autograd.backward(loss)
            return loss

        for _ in range(steps):
            optimizer.step(evaluate)
        return lora_matrices(model)

    assert same(trained(lambda p: LookTwice(p, 0.1), 2), trained(lambda p: SGD(p, 0.1, foreach=False), 4))


class Counting(AdamW):
    """A user's subclass, which counts its steps in the groups and calls the step that it extends."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["calls"] = group.get("calls", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize("closure", [False, True])
def test_a_step_that_calls_its_parents_step_trains_alike(closure: bool) -> None:
    def step(model: Any, optimizer: Any, number: int) -> None:
        optimizer.zero_grad()
        if closure:
            optimizer.step(lambda: net_loss(model, number).backward())
        else:
            net_loss(model, number).backward()
            optimizer.step()

    model, _, optimizer = make(lambda p: Counting(p, lr=1e-2))
    reference, _, plain = make(lambda p: AdamW(p, lr=1e-2))
    assert same(train(model, optimizer, range(3), step), train(reference, plain, range(3), step))
    assert [group["calls"] for group in optimizer.param_groups] == [3]
