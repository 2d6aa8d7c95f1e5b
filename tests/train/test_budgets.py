"""Budgets, quotas and rounds: how many sites a schedule takes, from which groups, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from loraover import Budget, LoraOverConfig
from loraover.overparam.importance import Score
from loraover.overparam.probe import Probe
from loraover.overparam.round import Round
from loraover.overparam.schedule import Schedule
from loraover.overparam.sites import Site

from support.speed import examples

STEPS = 100


class Given(Score):
    """Scores that a test has drawn."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.scores = scores

    def values(self, probe: Probe | None) -> dict[str, float]:
        return self.scores


class Cost(NamedTuple):
    """A site's group, and what it costs in the budget's unit."""

    group: str
    cost: int


@dataclass(frozen=True)
class Case:
    """A model's sites with their scores, and a configuration that fits them."""

    sites: dict[str, Site]
    scores: dict[str, float]
    config: LoraOverConfig

    def rounds(self) -> list[Round]:
        """What the schedule decides in a run of STEPS steps."""
        schedule = Schedule(self.config, self.sites, steps=STEPS, probe=None)
        schedule.score = Given(self.scores)
        if self.config.schedule == "static":
            schedule.choose(0)
        for step in range(1, STEPS):
            if schedule.is_due(step):
                schedule.choose(step)
        assert schedule.is_over
        return schedule.rounds

    def costs(self) -> dict[str, Cost]:
        def group(site: Site) -> str:
            _, _, layer, kind, matrix = site.name.split(".")
            return {"global": "all", "module": kind, "matrix": matrix, "layer": layer}[self.config.quota]

        decomposition, budget = self.config.make_decomposition(), self.config.budget
        assert budget is not None
        added = {name: decomposition.num_parameters(*s.shape) - math.prod(s.shape) for name, s in self.sites.items()}
        return {
            name: Cost(group(site), 1 if budget.parameters is None else added[name])
            for name, site in self.sites.items()
        }

    def capacity(self) -> int:
        budget = self.config.budget
        assert budget is not None
        if budget.fraction is not None:
            return max(1, round(budget.fraction * len(self.sites)))
        return budget.sites or budget.parameters or 0


def site(name: str, shape: tuple[int, int]) -> Site:
    module, _, matrix = name.rpartition(".lora_")
    return Site(name, module, "default", "A" if matrix == "A" else "B", nn.Parameter(torch.zeros(shape)))


@st.composite
def cases(draw: st.DrawFn, schedule: str, unit: str) -> Case:
    layers, r = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kinds = draw(st.dictionaries(st.sampled_from("qkvo"), st.tuples(*[st.integers(2, 12)] * 2), min_size=1))
    sites = {}
    for layer in range(layers):
        for kind, (rows, columns) in kinds.items():
            for matrix, shape in (("A", (r, columns)), ("B", (rows, r))):
                module = f"model.layers.{layer}.{kind}"
                name = f"{module}.lora_{matrix}"
                sites[name] = site(name, shape)
    numbers = st.sampled_from([0.0, 0.5, 1.0, 2.0]) | st.floats(-1, 5)
    scores = {name: draw(numbers) for name in sites}
    assume({site.matrix for name, site in sites.items() if scores[name]} == {"A", "B"})  # else the round waits
    rounds = draw(st.integers(1, 6)) if schedule == "dynamic" else 1
    options: dict[str, Any] = {"score": "random", "rounds": rounds, "decomposition": "svd"}
    options["quota"] = draw(st.sampled_from(["global", "module", "matrix", "layer"]))
    if unit == "fraction":
        amount: float = draw(st.floats(0.01, 1))
    elif unit == "sites":
        amount = draw(st.integers(1, len(sites)))
    else:
        svd = LoraOverConfig(decomposition="svd").make_decomposition()
        added = [svd.num_parameters(*site.shape) - math.prod(site.shape) for site in sites.values()]
        amount = draw(st.integers(min(added), sum(added)))
    return Case(sites, scores, LoraOverConfig(schedule=schedule, budget=Budget(**{unit: amount}), **options))


KINDS = pytest.mark.parametrize(
    ("schedule", "unit"), [(s, u) for s in ("static", "dynamic") for u in Budget.model_fields]
)


@KINDS
@examples(100)
@given(data=st.data())
def test_a_budget_is_spent_as_far_as_it_goes_and_by_each_group_within_one_site(
    schedule: str, unit: str, data: st.DataObject
) -> None:
    """It is never exceeded, and within a group the best sites are taken first."""
    case = data.draw(cases(schedule, unit))
    costs, rounds = case.costs(), case.rounds()
    chosen = {name for found in rounds for name in found.chosen}
    assert len(chosen) == sum(len(found.chosen) for found in rounds)
    check_spending(case, costs, chosen)
    check_shares(case, costs, chosen)
    check_order(case, costs, rounds)


def check_spending(case: Case, costs: dict[str, Cost], chosen: set[str]) -> None:
    """No site is left out that the budget and its group's share have room for."""
    capacity, spent = case.capacity(), sum(costs[name].cost for name in chosen)
    assert spent <= capacity
    assert spent == capacity or counts_parameters(case)
    everything = sum(cost for _, cost in costs.values())
    for name in costs.keys() - chosen:
        group, cost = costs[name]
        share = capacity * sum(c for g, c in costs.values() if g == group) / everything
        has_its_share = sum(costs[n].cost for n in chosen if costs[n].group == group) >= share - 1e-9
        assert cost > capacity - spent or has_its_share, name


def check_shares(case: Case, costs: dict[str, Cost], chosen: set[str]) -> None:
    everything = sum(costs[name].cost for name in costs)
    for group in {cost.group for cost in costs.values()}:
        members = [name for name in costs if costs[name].group == group]
        share = case.capacity() * sum(costs[name].cost for name in members) / everything
        spent = sum(costs[name].cost for name in members if name in chosen)
        largest = max(costs[name].cost for name in members)
        assert spent - share < largest + 1e-9
        assert share - spent < 1 + 1e-9 or counts_parameters(case)


def check_order(case: Case, costs: dict[str, Cost], rounds: list[Round]) -> None:
    taken: set[str] = set()
    for found in rounds:
        assert found.scores == {name: score for name, score in case.scores.items() if name not in taken}
        for name in found.chosen:
            better = [
                other
                for other in costs.keys() - taken - set(found.chosen)
                if costs[other].group == costs[name].group and case.scores[other] > case.scores[name]
            ]
            assert all(costs[other].cost > costs[name].cost for other in better)
        assert found.chosen == [name for name in case.sites if name in found.chosen]
        taken |= set(found.chosen)


def counts_parameters(case: Case) -> bool:
    return case.config.budget is not None and case.config.budget.parameters is not None


@examples(100)
@given(data=st.data(), unit=st.sampled_from(["sites", "fraction"]))
def test_rounds_come_evenly_and_take_even_parts(data: st.DataObject, unit: str) -> None:
    case = data.draw(cases("dynamic", unit))
    found, count = case.rounds(), case.config.rounds
    cumulative = list(accumulate(len(each.chosen) for each in found))
    assert [abs(n - case.capacity() * (k + 1) / count) <= 0.5 for k, n in enumerate(cumulative)] == [True] * count
    steps = [each.step for each in found]
    expected = [10.0] if count == 1 else [10 + 40 * k / (count - 1) for k in range(count)]
    assert steps == pytest.approx(expected, abs=0.5)


def test_a_score_that_is_no_number_counts_as_zero() -> None:
    names = [f"model.layers.0.{kind}.lora_A" for kind in "qkv"]
    sites = {name: site(name, (2, 4)) for name in names}
    config = LoraOverConfig(schedule="static", score="random", budget=Budget(sites=2))
    scores = dict(zip(names, [math.nan, 1.0, -1.0], strict=True))
    (found,) = Case(sites, scores, config).rounds()
    assert found.chosen == names[:2]
    assert found.scores == {names[0]: 0.0, names[1]: 1.0, names[2]: -1.0}


def test_added_parameters_are_those_of_the_cores() -> None:
    name = "model.layers.0.q.lora_A"
    sites = {name: site(name, (2, 4))}
    config = LoraOverConfig(schedule="static", score="random", budget=Budget(parameters=6), decomposition="svd")
    (found,) = Case(sites, {name: 1.0}, config).rounds()
    assert found.added == 2 * 2 + 2 + 2 * 4 - 2 * 4
