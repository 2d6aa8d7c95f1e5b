"""Scores are what their sources define, whatever scales or clips the gradients, and disturb nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD

from loraover import Budget, LoraOverConfig, OverParameterization, Probe
from loraover.overparam.importance import SCORES, GradientScore, LossImpact
from loraover.overparam.sites import find_sites, lora_layers

from oracles import scores as oracle
from support.make_checkpoint import numpy64
from support.speed import examples
from support.tiny_models import batch_loss, lora_matrices, net_batch, net_loss, tiny_net, trainable
from tolerances import UNIT, binomial_deviation, gamma

ORACLES: dict[str, Callable[[Sequence[oracle.Step], str], float]] = {
    "fisher": oracle.fisher,
    "taylor": oracle.taylor,
    "sensitivity": oracle.sensitivity,
    "inverse": oracle.inverse,
}

# Ours are float32. The joint norm sums fewer than 256 squares, a score fewer than 64 terms, and every term of a
# score has one sign, so that rounding grows with the number of terms alone. Sensitivity's |I - I_bar| cancels in
# single elements, each at most as much as the largest of some 64; that and the smoothing fit into 1000 roundings.
RELATIVE = gamma(1000, UNIT[torch.float32])


Change = Callable[[int, dict[str, Tensor]], object]
"""Edits what a score gets to see of a step's gradients."""


class Training:
    """Plain SGD, watched by scores."""

    def __init__(self) -> None:
        self.model = tiny_net()
        self.sites = find_sites(self.model)
        self.optimizer = SGD(trainable(self.model), lr=0.5)

    def score(self, name: str) -> GradientScore:
        score = SCORES[name](self.sites, 0)
        assert isinstance(score, GradientScore)
        return score

    def watched_by(
        self, score: GradientScore, steps: range, change: Change = lambda step, gradients: None
    ) -> list[oracle.Step]:
        """M and dL/dM before each step, as they were before `change`."""
        seen = []
        for step in steps:
            self.optimizer.zero_grad()
            net_loss(self.model, step).backward()
            gradients = {name: g.clone() for name, site in self.sites.items() if (g := site.gradient()) is not None}
            seen.append({name: (numpy64(self.sites[name].parameter), numpy64(g)) for name, g in gradients.items()})
            change(step, gradients)
            score.observe(gradients)
            self.optimizer.step()
        return seen


def observed(name: str, change: Change = lambda step, gradients: None) -> tuple[GradientScore, list[oracle.Step]]:
    """A score that has watched six steps, and what there was to see."""
    training = Training()
    score = training.score(name)
    return score, training.watched_by(score, range(6), change)


@pytest.mark.parametrize("name", ORACLES)
def test_a_score_is_what_its_source_defines(name: str) -> None:
    score, seen = observed(name)
    found = score.values(None)
    assert found == pytest.approx({site: ORACLES[name](seen, site) for site in score.sites}, rel=RELATIVE)
    assert len(set(found.values())) == len(found) == 6


@pytest.mark.parametrize("name", ORACLES)
@given(exponents=st.lists(st.integers(-40, 40), min_size=6, max_size=6))
@examples(15)
def test_a_loss_scale_changes_no_score(name: str, exponents: list[int]) -> None:
    def scale(step: int, gradients: dict[str, Tensor]) -> None:
        for gradient in gradients.values():
            gradient.mul_(2.0 ** exponents[step])

    assert observed(name, scale)[0].values(None) == observed(name)[0].values(None)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ORACLES)
def test_a_gradient_that_is_not_finite_changes_nothing(name: str, number: float) -> None:
    score, _ = observed(name)
    before, values = score.state(), score.values(None)
    gradients = {key: torch.ones(site.shape) for key, site in score.sites.items()}
    gradients["second.lora_B"][1, 2] = number
    score.observe(gradients)
    assert_same(score.state(), before)
    assert score.values(None) == values


@pytest.mark.parametrize("name", ORACLES)
def test_a_step_without_a_gradient_does_not_count(name: str) -> None:
    score, _ = observed(name)
    before = score.state()
    score.observe({})
    score.observe({key: torch.zeros(site.shape) for key, site in score.sites.items()})
    assert_same(score.state(), before)
    idle, again = type(score)(score.sites, 0), type(score)(score.sites, 0)
    idle.observe({key: torch.zeros(site.shape) for key, site in score.sites.items()})
    again.load(idle.state())
    assert again.values(None) == idle.values(None)


@pytest.mark.parametrize("name", ORACLES)
def test_a_site_without_a_gradient_scores_zero(name: str) -> None:
    score, _ = observed(name, lambda step, gradients: gradients.pop("third.lora_A"))
    values = score.values(None)
    assert [key for key, value in values.items() if value == 0] == ["third.lora_A"]
    assert SCORES[name](score.sites, 0).values(None) == dict.fromkeys(values, 0.0)


@pytest.mark.parametrize("name", ORACLES)
def test_a_score_goes_on_from_its_state(name: str) -> None:
    training = Training()
    first, second = training.score(name), training.score(name)
    second.load(first.state())
    assert second.state() == {}
    training.watched_by(first, range(3))
    kept = {key: tensor.clone() for key, tensor in first.state().items()}
    training.watched_by(first, range(3, 4))
    second.load(kept)
    assert_same(second.state(), kept)
    training.watched_by(second, range(4, 6))
    whole, _ = observed(name, lambda step, gradients: gradients.clear() if step == 3 else None)
    assert second.values(None) == whole.values(None)
    assert second.values(None) != first.values(None)


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_random_is_decided_by_seed_and_name_alone() -> None:
    sites = find_sites(tiny_net())
    values = SCORES["random"](sites, 3).values(None)
    torch.rand(1)
    assert SCORES["random"](dict(reversed(sites.items())), 3).values(None) == values
    alone = SCORES["random"]({"third.lora_A": find_sites(tiny_net(seed=1))["third.lora_A"]}, 3)
    assert alone.values(None) == {"third.lora_A": values["third.lora_A"]}
    others = [SCORES["random"](sites, seed).values(None) for seed in range(200)]
    assert others[3] == values
    assert len({tuple(other.values()) for other in others}) == 200
    best = [max(other, key=lambda name: other[name]) for other in others]
    assert {name: abs(best.count(name) - 200 / 6) < binomial_deviation(200, 1 / 6) for name in sites} == dict.fromkeys(
        sites, True
    )


# The loss without a module's update

BATCHES = [net_batch(seed, dtype=torch.float64) for seed in range(3)]


@torch.no_grad()
def mean_loss(model: Any) -> float:
    return float(np.mean([batch_loss(model, batch).item() for batch in BATCHES]))


def test_loss_impact_is_what_zeroing_b_by_hand_does() -> None:
    model = tiny_net(seed=1, dtype=torch.float64)
    sites, whole = find_sites(model), mean_loss(model)
    expected: dict[str, float] = {}
    for module in ("first", "second", "third"):
        b = sites[f"{module}.lora_B"].parameter
        kept = b.detach().clone()
        b.data.zero_()
        expected |= {f"{module}.lora_{matrix}": mean_loss(model) - whole for matrix in "AB"}
        b.data.copy_(kept)
    found = LossImpact(sites, 0).values(Probe(model, BATCHES, batch_loss))
    # Three layers of at most 8 terms, whose weights, inputs and outputs are below 8, in the same order but for B A = 0.
    assert found == pytest.approx(expected, rel=0, abs=8**4 * gamma(100, UNIT[torch.float64]))
    assert len({round(value, 9) for value in found.values()}) == 3
    assert min(found.values()) < 0 < max(found.values())


def test_loss_impact_runs_as_many_batches_as_it_says() -> None:
    model, calls = tiny_net(dtype=torch.float64), []

    def counted(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(batch)
        return batch_loss(model, batch)

    probe = Probe(model, BATCHES, counted)
    score = LossImpact({name: site for name, site in find_sites(model).items() if "third" not in name}, 0)
    score.values(probe)
    assert len(calls) == score.forwards(probe) == 9


class ProbeError(Exception):
    """Raised by a loss in the middle of a probe."""


@pytest.mark.parametrize(
    ("score", "raised_at"),
    [("fisher", None), ("fisher", 0), ("fisher", 10), ("loss_impact", None), ("loss_impact", 7), ("loss_impact", 15)],
)  # 8 warm-up steps, then 3 batches; loss_impact runs 3 more without each module
def test_a_probe_leaves_the_model_as_it_was(score: str, raised_at: int | None) -> None:
    model = tiny_net(dtype=torch.float64, lora_dropout=0.5, draw_b=False).train()
    calls: list[list[bool]] = []
    model.get_base_model().second.eval()
    modes = [module.training for module in model.modules()]
    matrices, random = lora_matrices(model), torch.get_rng_state()

    def watched(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        if len(calls) == raised_at:
            raise ProbeError
        calls.append([module.training for module in model.modules()])
        return batch_loss(model, batch) + torch.rand(())

    config = LoraOverConfig(schedule="static", score=score, budget=Budget(sites=2), sites=["second.*", "third.*"])
    with pytest.raises(ProbeError) if raised_at is not None else nullcontext():
        over = OverParameterization(model, config, probe=Probe(model, BATCHES, watched))
        matrices |= {key: m for key, m in lora_matrices(model).items() if site_of(key) in over.injected}
    backwards = 11 if score == "fisher" else 8
    assert all(map(all, calls[:backwards]))
    assert not any(map(any, calls[backwards:]))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert {key for layer in lora_layers(model).values() for key in layer.scaling.items()} == {("default", 2.0)}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_same(lora_matrices(model), matrices)


def site_of(key: str) -> str:
    return key.removeprefix("base_model.model.").removesuffix(".default.weight")
