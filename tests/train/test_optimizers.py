"""Optimizers, schedulers and training loops work as with a plain LoRA."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, OneCycleLR, ReduceLROnPlateau

from loraover import LoraOverConfig, OverParameterization
from loraover.checkpoint.error_bounds import gamma, unit_roundoff
from loraover.common.errors import ConfigError
from loraover.common.threads import one_thread

from support.optimizers import adagrad, adamw_8bit, muon
from support.tiny_models import (
    lora_matrices,
    net_batch,
    net_loss,
    tiny_llama,
    tiny_net,
    token_ids,
    trainable,
    with_lora,
)

Step = Callable[[Any, Optimizer, int], None]


@pytest.fixture(autouse=True, scope="module")
def _single_thread() -> Iterator[None]:
    with one_thread():
        yield


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
    parameters = [p for group in over.groups for k in group.parameters for p in k]
    return [copy.deepcopy(over.core_state(p)) for p in parameters]


def same(one: Any, other: Any) -> bool:
    """Bit for bit, through dicts and lists."""
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


def test_eight_bit_states_belong_to_the_cores() -> None:
    model, over, optimizer = make(adamw_8bit, decomposition="chain")
    train(model, optimizer, range(2))
    states = core_states(over)
    assert states
    assert all(state["state1"].dtype is torch.uint8 for state in states if state["state1"].numel() >= 16)


# Schedulers

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "linear": lambda o: LinearLR(o, start_factor=0.1, total_iters=4),
    "one-cycle": lambda o: OneCycleLR(o, max_lr=1e-2, total_steps=10),
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=1, factor=0.5),
}


def scheduled_rates(name: str, over_from: str | None) -> list[list[float]]:
    """The rates and momenta after each step, with over-parameterization attached "before" or "after"."""
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


def test_parameter_groups_keep_their_own_rates() -> None:
    model = tiny_net()
    frozen, live = trainable(model)[::2], trainable(model)[1::2]
    optimizer = SGD([{"params": frozen, "lr": 0.0}, {"params": live, "lr": 1e-1}])
    over = OverParameterization(model).attach(optimizer)
    before = {name: site.parameter.detach().clone() for name, site in over.sites.items()}
    train(model, optimizer, range(2))
    unchanged = {name for name, site in over.sites.items() if torch.equal(site.parameter, before[name])}
    assert unchanged == {name for name in over.sites if name.endswith("lora_A")}


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
        states = optimizer.state_dict()["state"], plain.state_dict()["state"]
        expected = {i: set(s) for i, s in states[1].items() if i % 2 == 1}  # every second one is a B
        assert {i: set(state) for i, state in states[0].items()} == expected
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
    assert all(p.grad is None for group in over.groups for k in group.parameters for p in k)


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


def test_accumulated_gradients_equal_one_large_batch() -> None:
    def trained(step: Step) -> dict[str, Tensor]:
        model = tiny_net(dtype=torch.float64)
        optimizer = SGD(trainable(model), lr=1e-1, momentum=0.9)
        OverParameterization(model).attach(optimizer)
        return train(model, optimizer, range(5), step)

    def accumulated(model: Any, optimizer: Optimizer, number: int) -> None:
        optimizer.zero_grad()
        x, y = net_batch(number, 8, torch.float64)
        for part in (slice(0, 4), slice(4, 8)):
            torch.autograd.backward((model(x[part]) - y[part]).square().mean() / 2)
        optimizer.step()

    def at_once(model: Any, optimizer: Optimizer, number: int) -> None:
        optimizer.zero_grad()
        net_loss(model, number, 8).backward()
        optimizer.step()

    one, other = trained(accumulated), trained(at_once)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=5 * gamma(1000, unit_roundoff(torch.float64)))


# Steps that must change nothing


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("bad", [0, 2])
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


def test_a_site_without_a_gradient_stays() -> None:
    model, over, optimizer = make(lambda p: AdamW(p, lr=1e-2, weight_decay=0.1))
    net = model.get_base_model()

    def step(model: Any, optimizer: Optimizer, number: int) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(net.second(torch.tanh(net.first(net_batch(number)[0]))).square().mean())
        optimizer.step()

    before = lora_matrices(model)
    after = train(model, optimizer, range(3), step)
    unchanged = {key for key in before if torch.equal(before[key], after[key])}
    assert unchanged == {key for key in before if "third" in key}
    assert len(unchanged) == 2
    for name, (group, i) in over.injected.items():
        states = [over.core_state(parameters[i]) for parameters in group.parameters]
        assert all(bool(state) is ("third" not in name) for state in states), name


def test_a_site_frozen_during_the_run_stays() -> None:
    model, over, optimizer = make()
    train(model, optimizer, range(2))
    frozen = over.sites["second.lora_A"].parameter
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    train(model, optimizer, range(2, 4))
    assert torch.equal(frozen, before)


def test_a_zero_rate_for_auxiliaries_freezes_them() -> None:
    model, over, optimizer = make(lambda p: AdamW(p, lr=1e-2, weight_decay=0.1), aux_lr_scale=0)
    before = cores(over)
    train(model, optimizer, range(3))
    k = 0
    for group in over.groups:
        for index, stack in enumerate(group.stacks):
            assert torch.equal(stack, before[k]) is (index != group.centre)
            k += 1


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


# Precision


def test_bfloat16_adapters_have_float32_cores() -> None:
    model = tiny_net(dtype=torch.bfloat16)
    optimizer = AdamW(trainable(model), lr=1e-5)
    over = OverParameterization(model).attach(optimizer)
    assert {stack.dtype for stack in cores(over)} == {torch.float32}
    before, first_cores = lora_matrices(model), cores(over)

    def step(model: Any, optimizer: Optimizer, _: int) -> None:
        ordinary_step(model, optimizer, 0)

    once, once_cores = train(model, optimizer, range(1), step), cores(over)
    assert not any(map(torch.equal, first_cores, once_cores))
    moved = [int((before[key] != once[key]).sum()) for key in before]
    later = train(model, optimizer, range(200), step)
    assert sum(int((before[key] != later[key]).sum()) for key in before) > 4 * sum(moved)
    assert {matrix.dtype for matrix in later.values()} == {torch.bfloat16}
    assert_contracted(over)


def test_autocast_around_a_step_is_not_used_for_contraction() -> None:
    def trained(inside: bool) -> dict[str, Tensor]:
        def step(model: Any, optimizer: Optimizer, number: int) -> None:
            optimizer.zero_grad()
            net_loss(model, number).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step()

        model, _, optimizer = make()
        return train(model, optimizer, range(3), step)

    assert same(trained(inside=True), trained(inside=False))


def test_gradient_checkpointing_gives_the_same_run() -> None:
    def trained(checkpointing: bool) -> dict[str, Tensor]:
        model = with_lora(tiny_llama()).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        optimizer = AdamW(trainable(model), lr=1e-2)
        OverParameterization(model).attach(optimizer)
        for step in range(2):
            tokens = token_ids(step)
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return lora_matrices(model)

    assert same(trained(True), trained(False))


# Refusals


class AdamWScheduleFree(AdamW):
    """Named like the schedulefree package's."""


class PatientLBFGS(torch.optim.LBFGS):
    """A user's subclass."""


def _deepspeed(base: type) -> Callable[[list[nn.Parameter]], Any]:
    kind = type("DeepSpeedZeroOptimizer", (base,), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    return lambda parameters: kind(parameters) if issubclass(base, Optimizer) else kind()


def _deepspeed_wrapper(parameters: list[nn.Parameter]) -> Any:
    """As Accelerate makes it around whatever optimizer it has given to DeepSpeed's engine."""
    wrapper = DeepSpeedOptimizerWrapper.__new__(DeepSpeedOptimizerWrapper)
    wrapper.optimizer = AdamW(parameters)
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
        (_deepspeed(object), "DeepSpeedZeroOptimizer steps in DeepSpeed"),
        (_deepspeed(SGD), "DeepSpeedZeroOptimizer steps in DeepSpeed"),
        (_deepspeed_wrapper, "DeepSpeed steps in its engine"),
        (AdamWScheduleFree, "AdamWScheduleFree"),
        (lambda parameters: parameters, r"builtins\.list"),
    ],
    ids=["lbfgs", "lbfgs-subclass", "deepspeed", "deepspeed-torch", "deepspeed-wrapper", "schedule-free", "list"],
)
def test_an_optimizer_with_another_kind_of_step_is_refused_by_name(
    build: Callable[[list[nn.Parameter]], Any], named: str
) -> None:
    model = tiny_net()
    over = OverParameterization(model)
    with pytest.raises(ConfigError, match=named):
        over.attach(build(trainable(model)))
    assert over.optimizer is None


def test_an_optimizer_that_lacks_a_matrix_is_refused() -> None:
    model = tiny_net()
    over = OverParameterization(model)
    optimizer = SGD(trainable(model)[:-1], lr=0.1)
    with pytest.raises(ConfigError, match=r"does not hold third\.lora_B"):
        over.attach(optimizer)
    over.attach(SGD(trainable(model), lr=0.1))


def test_a_second_attach_is_refused() -> None:
    _, over, optimizer = make()
    with pytest.raises(ConfigError, match="attached already"):
        over.attach(optimizer)


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


def test_fold_leaves_a_plain_model_and_optimizer() -> None:
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


def test_a_step_that_raised_leaves_no_trace_in_the_next() -> None:
    def evaluate(model: Any, optimizer: Optimizer, step: int) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = net_loss(model, step)
        torch.autograd.backward(loss)
        return loss.detach()

    def broken(model: Any, optimizer: Optimizer, step: int) -> Tensor:
        evaluate(model, optimizer, step)
        raise KeyboardInterrupt

    def trained(interrupted: bool) -> dict[str, Tensor]:
        model, _, optimizer = make(lambda p: AdamW(p, lr=1e-2))
        for step in range(4):
            if step == 2 and interrupted:
                with pytest.raises(KeyboardInterrupt):
                    optimizer.step(lambda step=step: broken(model, optimizer, step))
            optimizer.step(lambda step=step: evaluate(model, optimizer, step))
            assert [len(group["params"]) for group in optimizer.param_groups] == [6]
            assert optimizer.state_dict()["state"] == {}
        return lora_matrices(model)

    assert same(trained(True), trained(False))


def test_folding_after_a_step_that_raised_leaves_a_plain_optimizer() -> None:
    _, over, optimizer = make()

    def broken() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(broken)
    over.finish()
    assert [len(group["params"]) for group in optimizer.param_groups] == [6]


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


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    model, _, optimizer = make()
    train(model, optimizer, range(2))
    assert torch.equal(torch.get_rng_state(), before)
