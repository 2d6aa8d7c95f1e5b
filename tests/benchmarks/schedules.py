"""Cost of schedules and scores: SmolLM2-135M, whose dynamic schedule gives cores to a quarter of the sites."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table
from torch import Tensor, nn

from loraover import Budget, LoraOverConfig, OverParameterization, Probe
from loraover.overparam.importance import LossImpact

from benchmarks.clock import timed
from benchmarks.intervals import Ratio, median_ratio
from benchmarks.settings import SMOL
from benchmarks.shown import table_of
from benchmarks.training import Step, add_lora, load, step_of

FRACTION = 0.25
MOST_RATIO, MOST_DECISION_S = 1.02, 1.0
WARM_UP = 2


def make_arm(base: nn.Module, ids: Tensor, config: LoraOverConfig) -> tuple[OverParameterization, Step]:
    """Make a model that is trained with a schedule, and the function that takes one training step."""
    model, optimizer = add_lora(base)
    over = OverParameterization(model, config, steps=1000)
    over.attach(optimizer)
    return over, step_of(model, optimizer, ids)


@dataclass(frozen=True)
class Cost:
    """What a score costs.

    Args:
        ratio: Step time while a dynamic schedule still scores, over that of `all` on the same sites.
        decision_s: Seconds to score all sites and give cores to more of them.
        sites: Number of sites with cores during the steps.
        injected: Number of sites that get cores in the decision.
    """

    ratio: Ratio
    decision_s: float
    sites: int
    injected: int


def measure(rounds: int = 24) -> Iterator[Table]:
    """Compare the steps of a dynamic schedule that still scores with those of `all` on the same sites."""
    base, ids = load()
    costs = {score: time_score(base, ids, score, rounds) for score in ("fisher", "taylor", "sensitivity")}
    over, _ = make_arm(base, ids, LoraOverConfig())
    forwards = LossImpact(over.sites, 0).forwards(Probe(base, [ids]))
    (sites,) = {cost.sites for cost in costs.values()}
    peer = f"step / `all` on the same {sites} sites [95 %]"
    table = table_of(
        f"Schedules: SmolLM2-135M, {SMOL.batch} x {SMOL.length} tokens, {rounds} paired steps",
        *("score", peer, f"at most {MOST_RATIO}?", "one decision", f"at most {MOST_DECISION_S:g} s?"),
        caption=f"`loss_impact` costs nothing between decisions, and {forwards} forwards a batch at each of them.",
    )
    for score, cost in costs.items():
        table.add_row(
            score,
            cost.ratio.shown(4),
            verdict(cost.ratio.low, cost.ratio.high, MOST_RATIO),
            f"{cost.decision_s:.2f} s, {cost.injected} sites",
            verdict(cost.decision_s, cost.decision_s, MOST_DECISION_S),
        )
    yield table


def time_score(base: nn.Module, ids: Tensor, score: str, rounds: int) -> Cost:
    """Paired steps of a schedule whose second round is far away, so that it scores in all of them; then that round."""
    budget = Budget(fraction=2 * FRACTION)
    config = LoraOverConfig(schedule="dynamic", score=score, budget=budget, rounds=2, start=0.001, end=0.9)
    dynamic, step = make_arm(base, ids, config)
    while not dynamic.injected:
        step()
    names = list(dynamic.injected)
    _, plain_step = make_arm(base, ids, LoraOverConfig(sites=names))
    times: dict[str, list[float]] = {"dynamic": [], "all": []}
    draw = random.Random(0)
    for number in range(rounds + WARM_UP):
        for name, take in draw.sample([("dynamic", step), ("all", plain_step)], 2):
            seconds = timed(take, ids.device).whole
            if number >= WARM_UP:
                times[name].append(seconds)
    assert dynamic.schedule.observed is not None
    decision = timed(dynamic._hold_round, ids.device).whole
    ratio = median_ratio(times["dynamic"], times["all"])
    return Cost(ratio, decision, len(names), len(dynamic.injected) - len(names))


def verdict(low: float, high: float, limit: float) -> str:
    """Say whether an interval that holds the true value keeps a limit."""
    return "yes" if high <= limit else "no" if low > limit else "undecided"
