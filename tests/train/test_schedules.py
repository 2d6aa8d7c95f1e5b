"""Schedules in a run: what they look at, when they decide, and what they leave behind."""

from __future__ import annotations

import copy
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from loraover import Budget, LoraOverConfig, OverParameterization, Probe, read_checkpoint
from loraover.common.errors import ConfigError
from loraover.overparam.importance import SCORES, GradientScore
from loraover.overparam.round import Round
from loraover.overparam.schedule import Schedule
from loraover.overparam.sites import find_sites

from oracles import scores as oracle
from support.hooked_run import train as hooked
from support.make_checkpoint import adamw, cores_of, make_checkpoint, numpy64, reopened, train
from support.tiny_models import batch_loss, lora_matrices, net_batch, net_loss, tiny_net, trainable
from tolerances import UNIT, gamma

BATCHES = [net_batch(seed) for seed in range(3)]


def static(model: nn.Module, loss: Callable[[Any, Any], Tensor] = batch_loss, **config: Any) -> Schedule:
    """A static schedule of this model that has yet to decide."""
    options = {"schedule": "static", "budget": Budget(sites=2)} | config
    probe = Probe(model, BATCHES, loss)
    return Schedule(LoraOverConfig(**options), find_sites(model), steps=None, probe=probe)


def dynamic(
    model: nn.Module, optimizer: Optimizer, steps: int = 10, probe: Probe | None = None, **config: Any
) -> OverParameterization:
    options = {"schedule": "dynamic", "budget": Budget(sites=4), "rounds": 2, "start": 0.2} | config
    return OverParameterization(model, LoraOverConfig(**options), steps=steps, probe=probe).attach(optimizer)


# Static


@pytest.mark.parametrize("draw_b", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_warm_up_steps_are_told_where_b_is_zero(score: str, draw_b: bool, caplog: pytest.LogCaptureFixture) -> None:
    """That they are undone is shown in test_importance.py."""
    with caplog.at_level(logging.INFO, "loraover"):
        found = static(tiny_net(draw_b=draw_b), score=score).choose(0)
    assert found is not None
    assert len(found.chosen) == 2
    told = [record.levelname for record in caplog.records if "8 warm-up steps on 3 batches" in record.message]
    assert told == (["WARNING"] if score != "random" and not draw_b else [])


@pytest.mark.parametrize("score", ["fisher", "taylor", "sensitivity"])
def test_static_scores_are_those_of_the_calibration_batches(score: str) -> None:
    model = tiny_net()
    found = static(model, score=score).choose(0)
    sites, seen = find_sites(model), []
    for batch in BATCHES:
        torch.autograd.backward(batch_loss(model, batch))
        gradients = {name: numpy64(g) for name, site in sites.items() if (g := site.gradient()) is not None}
        seen.append({name: (numpy64(sites[name].parameter), gradient) for name, gradient in gradients.items()})
        model.zero_grad()
    expected = {name: getattr(oracle, score)(seen, name) for name in sites}
    assert found is not None
    assert found.scores == pytest.approx(expected, rel=gamma(1000, UNIT[torch.float32]))
    assert set(found.chosen) == {max((n for n in sites if n.endswith(x)), key=lambda n: expected[n]) for x in "AB"}


@pytest.mark.parametrize("score", ["fisher", "taylor", "sensitivity", "loss_impact"])
@pytest.mark.parametrize("matrix", "AB")
def test_a_fresh_lora_is_scored_though_one_matrix_alone_may_be_chosen(score: str, matrix: str) -> None:
    found = static(tiny_net(draw_b=False), score=score, sites=[f"*.lora_{matrix}"]).choose(0)
    assert found is not None
    assert len(found.scores) == 3
    assert all(value != 0 for value in found.scores.values())


def test_a_static_score_that_stays_zero_is_an_error() -> None:
    model = tiny_net()
    before = lora_matrices(model)
    schedule = static(model, lambda model, batch: 0.0 * batch_loss(model, batch))
    with pytest.raises(ConfigError, match="fisher is zero for every A and B"):
        schedule.choose(0)
    assert all(torch.equal(matrix, before[key]) for key, matrix in lora_matrices(model).items())


def test_a_static_schedule_trains_what_it_chose() -> None:
    model = tiny_net(draw_b=False)
    config = LoraOverConfig(schedule="static", budget=Budget(sites=2))
    over = OverParameterization(model, config, probe=Probe(model, BATCHES, batch_loss))
    (found,) = over.schedule.rounds
    assert set(over.injected) == set(found.chosen)
    assert found.step == found.forwards == 0
    cores, matrices = over.num_parameters()
    assert found.added == cores - matrices > 0
    before = lora_matrices(model)
    over.attach(optimizer := AdamW(trainable(model), lr=1e-2))
    hooked(model, optimizer, range(3))
    assert not any(torch.equal(before[key], matrix) for key, matrix in lora_matrices(model).items())
    assert over.schedule.rounds == [found]


def test_a_schedule_that_takes_all_needs_no_score() -> None:
    over = OverParameterization(model := tiny_net(), LoraOverConfig(score="loss_impact"))
    over.attach(AdamW(trainable(model)))
    (found,) = over.schedule.rounds
    assert found.chosen == list(over.sites)
    assert found.scores == {}


# Dynamic


@pytest.mark.parametrize("score", SCORES)
def test_rounds_are_held_after_their_steps(score: str) -> None:
    model = tiny_net()
    probe = Probe(model, BATCHES, batch_loss) if score == "loss_impact" else None
    optimizer = AdamW(trainable(model), lr=1e-2)
    over = dynamic(model, optimizer, score=score, probe=probe)
    counts = []
    for step in range(10):
        hooked(model, optimizer, range(step, step + 1))
        counts.append(len(over.injected))
    assert counts == [0, 2, 2, 2, 4, 4, 4, 4, 4, 4]
    first, second = over.schedule.rounds
    assert (first.step, second.step, over.step) == (2, 5, 10)
    assert second.scores.keys() == over.sites.keys() - set(first.chosen)
    assert first.forwards == second.forwards == (3 * 4 if score == "loss_impact" else 0)
    assert {group.step for group in over.groups} == {2, 5}


@pytest.mark.parametrize("score", ["fisher", "taylor", "sensitivity"])
def test_dynamic_scores_are_those_of_every_step_so_far(score: str) -> None:
    model = tiny_net()
    optimizer = SGD(trainable(model), lr=0.1)
    over = dynamic(model, optimizer, score=score)
    seen = []
    for step in range(5):
        optimizer.zero_grad()
        net_loss(model, step).backward()
        nn.utils.clip_grad_norm_(trainable(model), 1e-2)
        gradients = {name: numpy64(g) for name, site in over.sites.items() if (g := site.gradient()) is not None}
        seen.append({name: (numpy64(over.sites[name].parameter), gradient) for name, gradient in gradients.items()})
        optimizer.step()
    for found in over.schedule.rounds:
        expected = {name: getattr(oracle, score)(seen[: found.step], name) for name in found.scores}
        assert found.scores == pytest.approx(expected, rel=gamma(1000, UNIT[torch.float32]))
    assert len(over.schedule.rounds) == 2


def test_nothing_is_watched_once_the_rounds_are_over() -> None:
    model = tiny_net()
    optimizer = SGD(trainable(model), lr=0.1)
    over = dynamic(model, optimizer)
    assert over.schedule.observed is over.schedule.score
    hooked(model, optimizer, range(5))
    assert isinstance(over.schedule.score, GradientScore)
    kept = over.schedule.score.state()
    hooked(model, optimizer, range(5, 7))
    assert over.schedule.observed is None
    assert over.schedule.score.state()["steps"] == kept["steps"] == 5


@pytest.mark.parametrize("score", ["taylor", "loss_impact"])
def test_a_round_waits_while_every_score_is_zero(score: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_net(draw_b=False)
    optimizer = AdamW(trainable(model), lr=1e-2)
    scheduler = LambdaLR(optimizer, lambda step: float(step >= 6))
    over = dynamic(model, optimizer, score=score, steps=20, probe=Probe(model, BATCHES, batch_loss))
    with caplog.at_level(logging.INFO, "loraover"):
        for step in range(20):
            hooked(model, optimizer, range(step, step + 1))
            scheduler.step()
    # The seventh step is the first that moves B, the eighth the first whose gradient sees it.
    first = {"taylor": 8, "loss_impact": 7}[score]
    assert [found.step for found in over.schedule.rounds] == [first, 10]
    assert [len(found.chosen) for found in over.schedule.rounds] == [2, 2]
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"step 4: {score} is zero for every A and B while B = 0; the round waits"
    ]
    decided = [record.message for record in caplog.records if record.levelname == "INFO"]
    assert decided[0].startswith(f"step {first}: 2 of 6 sites over-parameterised by {score},")
    scores = over.schedule.rounds[0].ranked
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert decided[1:3] == [f"  {score:.3e}  {name}" for name, score in scores.items()]


@pytest.mark.parametrize("score", ["fisher", "inverse"])
def test_a_round_waits_for_the_first_gradient_of_a_where_b_has_one_already(
    score: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_net(draw_b=False)
    optimizer = AdamW(trainable(model), lr=1e-2)
    scheduler = LambdaLR(optimizer, lambda step: float(step >= 1))
    over = dynamic(model, optimizer, score=score, steps=10)
    with caplog.at_level(logging.INFO, "loraover"):
        for step in range(5):
            hooked(model, optimizer, range(step, step + 1))
            scheduler.step()
    # The second step is the first that moves B, the third the first that sees it.
    first, second = over.schedule.rounds
    assert (first.step, second.step) == (3, 5)
    assert all(first.scores.values())
    assert set(first.chosen) == {
        max((n for n in first.scores if n.endswith(matrix)), key=lambda n: first.scores[n]) for matrix in "AB"
    }
    assert [record.message for record in caplog.records if "waits" in record.message] == [
        f"step 2: {score} is zero for every A while B = 0; the round waits"
    ]


@pytest.mark.parametrize("where", ["first.lora_A", "third.lora_B"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_neither_counts_nor_feeds_a_score(fused: bool, where: str) -> None:
    def run(bad: int | None) -> tuple[OverParameterization, dict[str, Tensor]]:
        model = tiny_net()
        optimizer = AdamW(trainable(model), lr=1e-2, fused=fused, foreach=False)
        over = dynamic(model, optimizer, sites=["third.*", "second.*"], budget=Budget(sites=2))
        scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        for number in [*range(3), bad, *range(3, 6)]:
            if number is None:
                continue
            optimizer.zero_grad()
            scaler.scale(net_loss(model, number)).backward()
            if number == bad:
                over.sites[where].parameter.grad[0, 0] = math.inf  # type: ignore[index]
            scaler.step(optimizer)
            scaler.update()
        return over, lora_matrices(model)

    (over, matrices), (skipping, others) = run(None), run(9)
    assert over.step == skipping.step == 6
    assert [found.step for found in over.schedule.rounds] == [2, 5]
    assert skipping.schedule.rounds == over.schedule.rounds
    assert [key for key in matrices if not torch.equal(matrices[key], others[key])] == []


@pytest.mark.matrix
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_a_model_that_inductor_compiles_trains_as_an_eager_one() -> None:
    def run(compiled: bool) -> tuple[dict[str, Tensor], list[Round]]:
        model = tiny_net(dtype=torch.float64)
        # No pool of workers beside tests that fork.
        taken: Any = torch.compile(model, options={"compile_threads": 1}) if compiled else model
        optimizer = AdamW(trainable(model), lr=1e-2, eps=1e-3)
        over = dynamic(taken, optimizer)
        for step in range(7):
            optimizer.zero_grad()
            torch.autograd.backward(batch_loss(taken, net_batch(step, dtype=torch.float64)))
            optimizer.step()
        return lora_matrices(model), over.schedule.rounds

    counters.clear()
    compiled, rounds = run(True)
    eager, others = run(False)
    assert counters["stats"]["unique_graphs"] >= 1
    assert counters["inductor"]
    # Gradients differ by rounding, and an update of at most lr / eps = 10 of them, in seven steps.
    assert max(float((compiled[key] - matrix).abs().max()) for key, matrix in eager.items()) < 2e-12
    assert [found.chosen for found in rounds] == [found.chosen for found in others]
    assert len(rounds) == 2


# Saved and resumed


EIGEN: dict[str, Any] = {"decomposition": "eigen", "options": {"block": 16, "refresh": 2, "growth": 1}}


@pytest.mark.parametrize("settings", [{"score": "sensitivity"}, EIGEN], ids=str)
@pytest.mark.parametrize("saved_at", [1, 3, 6])
def test_every_decision_survives_a_checkpoint(settings: dict[str, Any], saved_at: int, tmp_path: Path) -> None:
    config = LoraOverConfig(schedule="dynamic", budget=Budget(sites=5), rounds=2, start=0.2, seed=5, **settings)
    made = make_checkpoint(tmp_path, config=config, steps=saved_at, total=10)
    found = read_checkpoint(made.path).meta
    assert found.rounds == made.over.schedule.rounds
    assert len(found.rounds) == {1: 0, 3: 1, 6: 2}[saved_at]
    assert found.optimizer_steps == saved_at
    assert found.optimizer == "AdamW"
    resumed = reopened(made, adamw, total=10)
    resumed.optimizer.load_state_dict(copy.deepcopy(made.optimizer.state_dict()))
    assert resumed.over.schedule.rounds == found.rounds
    for each in (made, resumed):
        train(each.model, each.optimizer, range(saved_at, 8))
    assert resumed.over.schedule.rounds == made.over.schedule.rounds
    assert [each.step for each in made.over.schedule.rounds] == [2, 5]
    ours, theirs = cores_of(resumed.over), cores_of(made.over)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert torch.equal(resumed.logits(), made.logits())
