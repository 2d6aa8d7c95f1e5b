"""A planted problem: scores find the modules that alone can lower the loss, and chance does not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from loraover import Budget, LoraOverConfig, OverParameterization, Probe

from support.tiny_models import trainable, with_lora
from tolerances import binomial_deviation

pytestmark = pytest.mark.statistical

MODULES, PLANTED, IN, OUT, ROWS = 8, 2, 6, 4, 96
SEEDS, STEPS = range(10), 20
CHANCE = PLANTED / MODULES

Batch = tuple[Tensor, Tensor]


class Sum(nn.Module):
    """Every module reads features of its own, and the outputs are added."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(IN, OUT, bias=False) for _ in range(MODULES))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [part(features) for part, features in zip(self.parts, x.view(-1, MODULES, IN).unbind(1), strict=True)]
        return torch.stack(outputs).sum(0)


class Problem:
    """The target differs from the model's output by what the planted modules' features give, and by noise.

    Every module has a gradient: in a batch of a few rows, all features happen to go with the target.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        planted = torch.randperm(MODULES, generator=self.generator)[:PLANTED].tolist()
        self.sites = {f"parts.{i}.lora_{matrix}" for i in planted for matrix in "AB"}
        base = Sum()
        for weight in base.parameters():
            weight.data = self.draw(OUT, IN)
        self.target = {name: weight.detach().clone() for name, weight in base.named_parameters()}
        for i in planted:
            u, v = (nn.functional.normalize(self.draw(size), dim=0) for size in (OUT, IN))
            self.target[f"parts.{i}.weight"] += 2 * torch.outer(u, v)
        self.model = with_lora(base, draw_b=False, seed=seed, r=2, target_modules=[str(i) for i in range(MODULES)])

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def batches(self) -> Iterator[Batch]:
        while True:
            x = self.draw(ROWS, MODULES * IN)
            yield x, torch.func.functional_call(Sum(), self.target, (x,)) + 0.5 * self.draw(ROWS, OUT)

    def recall(self, over: OverParameterization) -> float:
        """Share of the planted sites among the chosen, which are as many."""
        assert len(over.injected) == len(self.sites)
        return len(over.injected.keys() & self.sites) / len(self.sites)


def loss_of(model: Any, batch: Batch) -> Tensor:
    x, y = batch
    loss: Tensor = (model(x) - y).square().mean()
    return loss


def chosen_before(problem: Problem, score: str) -> OverParameterization:
    config = LoraOverConfig(schedule="static", score=score, budget=Budget(sites=2 * PLANTED), seed=0)
    probe = Probe(problem.model, list(islice(problem.batches(), config.calibration_batches)), loss_of)
    return OverParameterization(problem.model, config, probe=probe)


def chosen_during(problem: Problem, score: str) -> OverParameterization:
    config = LoraOverConfig(schedule="dynamic", score=score, budget=Budget(sites=2 * PLANTED), seed=0, end=0.9)
    batches = list(islice(problem.batches(), 4))
    over = OverParameterization(problem.model, config, steps=STEPS, probe=Probe(problem.model, batches, loss_of))
    optimizer = AdamW(trainable(problem.model), lr=1e-2)
    over.attach(optimizer)
    for batch in islice(problem.batches(), STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(problem.model, batch))
        optimizer.step()
    return over


CHOOSE = {"static": chosen_before, "dynamic": chosen_during}


def mean_recall(schedule: str, score: str) -> float:
    problems = map(Problem, SEEDS)
    return sum(problem.recall(CHOOSE[schedule](problem, score)) for problem in problems) / len(SEEDS)


@pytest.mark.parametrize(
    ("schedule", "score"),
    [("static", "fisher"), ("dynamic", "taylor"), ("dynamic", "sensitivity"), ("static", "loss_impact")],
)
def test_a_score_finds_the_planted_modules(schedule: str, score: str) -> None:
    assert mean_recall(schedule, score) >= 0.9


def test_chance_does_not_find_them() -> None:
    trials = len(SEEDS) * 2 * PLANTED
    assert abs(mean_recall("dynamic", "random") - CHANCE) < binomial_deviation(trials, CHANCE, failure=1e-2) / trials


def test_the_inverse_avoids_them() -> None:
    assert mean_recall("static", "inverse") < CHANCE / 2


def test_every_module_has_a_gradient() -> None:
    problem = Problem(0)
    over = chosen_during(problem, "fisher")
    assert all(value > 0 for value in over.schedule.rounds[0].scores.values())
