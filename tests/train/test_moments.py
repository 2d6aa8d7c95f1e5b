"""The optimizer's moments of a matrix are carried into its centre core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, RMSprop

from loraover import LoraOverConfig, OverParameterization
from loraover.overparam.decompositions import DECOMPOSITIONS

from strategies import SEEDS, Case, cases, normal, random_cores
from support.hooked_run import ordinary_step
from support.optimizers import adagrad, adamw_8bit, muon
from support.speed import examples
from support.tiny_models import lora_matrices, net_loss, tiny_net, trainable
from tolerances import UNDERFLOW, UNIT, chain_terms, gamma

DECOMPOSED: dict[str, tuple[str, dict[str, Any]]] = {
    "mpo-1": ("mpo", {"num_cores": 1}),
    "mpo-2": ("mpo", {"num_cores": 2}),
    "mpo-3": ("mpo", {}),
    "mpo-4": ("mpo", {"num_cores": 4}),
    "mpo-wide": ("mpo", {"expansion": 2.5}),
    "svd": ("svd", {}),
    "chain": ("chain", {}),
    "eigen": ("eigen", {"block": 3}),
    "eigen-long": ("eigen", {"short": "none"}),
    "chain-3": ("chain", {"depth": 3, "expansion": 1.5}),
}
STEPS = 5

Build = Callable[[list[nn.Parameter]], Any]


def jacobian(case: Case, cores: Sequence[Tensor]) -> Tensor:
    """d vec(M) / d vec(centre) of one matrix, (m n, p q), by autograd through the contraction."""
    decomposition, k = case.decomposition, case.decomposition.centre(case.m, case.n)

    def contract(centre: Tensor) -> Tensor:
        return decomposition.contract([*cores[:k], centre, *cores[k + 1 :]], case.m, case.n)

    found = torch.autograd.functional.jacobian(contract, cores[k], vectorize=True)  # type: ignore[no-untyped-call]
    return found.reshape(case.m * case.n, -1)  # type: ignore[no-any-return]


# The map from a matrix's gradient to the centre's


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("name", DECOMPOSITIONS)
@given(data=st.data(), seed=SEEDS)
@examples(30)
def test_the_centres_gradient_is_the_transposed_jacobian(
    name: str, squared: bool, data: st.DataObject, seed: int
) -> None:
    case = data.draw(cases(name))
    cores = random_cores(case, 2, seed)
    gradients = normal(seed + 100, 2, case.m, case.n)
    gradients = gradients.square() if squared else gradients
    found = case.decomposition.to_centre(cores, gradients, case.m, case.n, squared=squared)
    assert found.shape == cores[case.decomposition.centre(case.m, case.n)].shape
    terms = 2 * chain_terms(case.decomposition.core_shapes(case.m, case.n)) + case.m + case.n
    for i, gradient in enumerate(gradients):
        j = jacobian(case, [core[i : i + 1] for core in cores])
        j = j.square() if squared else j
        # Squaring the frames doubles the number of roundings behind an element of J; |C_k| bounds their sizes.
        sizes = jacobian(case, [core[i : i + 1].abs() for core in cores])
        sizes = sizes.square() if squared else sizes
        bound = 2 * gamma(2 * terms, UNIT[torch.float64]) * (sizes.mT @ gradient.abs().flatten())
        assert ((found[i].flatten() - j.mT @ gradient.flatten()).abs() <= bound + UNDERFLOW[torch.float64]).all()


# Moments of a run


def trained(build: Build, steps: int = STEPS, **config: Any) -> tuple[Any, OverParameterization, Any, list[Any]]:
    """A run in which only `first.lora_A` is over-parameterised, and the gradients of all matrices in each step."""
    model = tiny_net(dtype=torch.float64)
    over = OverParameterization(model, LoraOverConfig(sites=["first.lora_A"], seed=4, **config))
    optimizer = build(trainable(model))
    over.attach(optimizer)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        net_loss(model, step).backward()
        seen.append({name: site.gradient().clone() for name, site in over.sites.items()})  # type: ignore[union-attr]
        optimizer.step()
    return model, over, optimizer, seen


def later_sites(over: OverParameterization) -> list[str]:
    return [name for name in over.sites if name != "first.lora_A"]


def centre_of(over: OverParameterization, name: str) -> tuple[Tensor, Tensor]:
    """The centre core and the Jacobian of its matrix."""
    group, i = over.injected[name]
    case = Case(over.config.decomposition, over.config.options, *group.shape)
    return group.stacks[group.centre][i], jacobian(case, [stack[i : i + 1] for stack in group.stacks])


def state_of(over: OverParameterization, name: str) -> dict[str, Any]:
    """The optimizer's state of the centre core."""
    group, i = over.injected[name]
    return group.core_state(group.centre, i)


def adam(parameters: list[nn.Parameter]) -> Adam:
    return Adam(parameters, lr=1e-2, betas=(0.8, 0.9), amsgrad=True, foreach=False)


@pytest.mark.parametrize("name", DECOMPOSED)
def test_carried_moments_are_those_of_a_centre_that_was_trained_all_along(name: str) -> None:
    decomposition, options = DECOMPOSED[name]
    _, over, optimizer, seen = trained(adam, decomposition=decomposition, options=options)
    before = {site: optimizer.state[over.sites[site].parameter] for site in later_sites(over)}
    over.inject(later_sites(over), step=STEPS)
    for site in later_sites(over):
        centre, j = centre_of(over, site)
        state = state_of(over, site)
        assert state.keys() == before[site].keys() == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        assert state["step"] == STEPS

        mean = torch.zeros_like(centre)
        for gradients in seen:
            pulled = (j.mT @ gradients[site].flatten()).view(centre.shape)
            mean = 0.8 * mean + 0.2 * pulled
        # Some hundred roundings on numbers below 1.
        torch.testing.assert_close(state["exp_avg"], mean, rtol=0, atol=gamma(1000, UNIT[torch.float64]))
        assert mean.abs().max() > 1e-4
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            expected = (j.square().mT @ before[site][key].flatten()).view(centre.shape)
            torch.testing.assert_close(state[key], expected, rtol=1e-12, atol=0)
        group, i = over.injected[site]
        assert all(group.core_state(k, i) == {} for k in group.trained if k != group.centre)
    assert not any(over.sites[site].parameter in optimizer.state for site in over.sites)


def _adafactor(parameters: list[nn.Parameter]) -> Any:
    from transformers import Adafactor

    return Adafactor(parameters, lr=1e-2, relative_step=False, scale_parameter=False, beta1=0.9)


def _listing(name: str, parameters: list[nn.Parameter]) -> Any:
    """An optimizer that keeps tensors in lists."""
    library = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    return getattr(library, name)(parameters, lr=1e-2)


CARRIED: dict[str, tuple[Build, set[str]]] = {
    "adamw": (lambda p: AdamW(p, lr=1e-2), {"step", "exp_avg", "exp_avg_sq"}),
    "adamw-fused": (lambda p: AdamW(p, lr=1e-2, fused=True), {"step", "exp_avg", "exp_avg_sq"}),
    "nadam": (lambda p: NAdam(p, lr=1e-2), {"step", "mu_product", "exp_avg", "exp_avg_sq"}),
    "sgd": (lambda p: SGD(p, lr=1e-2, momentum=0.9), {"momentum_buffer"}),
    "sgd-plain": (lambda p: SGD(p, lr=1e-2), set()),
    "muon": (lambda p: muon(p, lr=1e-2), {"momentum_buffer"}),
    "adagrad": (lambda p: adagrad(p, lr=1e-2), {"step", "sum"}),
    "rmsprop": (lambda p: RMSprop(p, lr=1e-3, centered=True), {"step", "square_avg", "grad_avg"}),
    "torch-adafactor": (lambda p: torch.optim.Adafactor(p, lr=1e-2), set()),
    "adamax": (lambda p: torch.optim.Adamax(p, lr=1e-2), set()),
    "rprop": (lambda p: torch.optim.Rprop(p, lr=1e-3), set()),
    "adafactor": (_adafactor, set()),
    "adamw-8bit": (adamw_8bit, set()),
    "aggmo": (lambda p: _listing("AggMo", p), set()),
    "kron": (lambda p: _listing("Kron", p), set()),
}
"""What each optimizer's centre cores go on with; nothing where a moment has another shape or meaning."""


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("carry", [True, False])
def test_every_optimizer_goes_on_or_starts_afresh(name: str, carry: bool) -> None:
    build, keys = CARRIED[name]
    model = tiny_net()
    over = OverParameterization(model, LoraOverConfig(sites=["first.lora_A"], carry_moments=carry))
    over.attach(optimizer := build(trainable(model)))
    for step in range(4):
        optimizer.zero_grad()
        net_loss(model, step).backward()
        if step == 2:
            over.inject(later_sites(over), step=2)
            for site in later_sites(over):
                group, i = over.injected[site]
                states = [group.core_state(k, i) for k in group.trained]
                assert {key for key, value in states.pop(group.centre).items() if value is not None} == (
                    keys if carry else set()
                )
                assert not any(states)
        before = lora_matrices(model)
        optimizer.step()
        assert [key for key, matrix in lora_matrices(model).items() if torch.equal(matrix, before[key])] == []


@pytest.mark.parametrize("name", DECOMPOSED)
def test_the_variance_of_a_centred_rmsprop_stays_positive(name: str) -> None:
    """Also where gradients hardly change, so that mean and mean square, each converted by itself, would not agree."""
    decomposition, options = DECOMPOSED[name]
    model = tiny_net()
    config = LoraOverConfig(sites=["first.lora_A"], decomposition=decomposition, options=options)
    over = OverParameterization(model, config)
    over.attach(optimizer := RMSprop(trainable(model), lr=1e-4, alpha=0.9, centered=True))
    for step in range(10):
        optimizer.zero_grad()
        net_loss(model, step % 2).backward()
        if step == 5:
            over.inject(later_sites(over), step=step)
            for state in (state_of(over, site) for site in later_sites(over)):
                variance = state["square_avg"] - state["grad_avg"].square()
                assert bool((variance >= -4 * UNIT[torch.float32] * state["square_avg"]).all())
        optimizer.step()
    assert all(bool(matrix.isfinite().all()) for matrix in lora_matrices(model).values())


def test_moments_of_a_half_precision_adapter_take_the_cores_precision() -> None:
    model = tiny_net(dtype=torch.bfloat16)
    over = OverParameterization(model, LoraOverConfig(sites=["first.lora_A"]))
    over.attach(optimizer := AdamW(trainable(model), lr=1e-2))
    for step in range(3):
        ordinary_step(model, optimizer, step)
    over.inject(later_sites(over), step=3)
    for site in later_sites(over):
        assert {state_of(over, site)[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    ordinary_step(model, optimizer, 3)
