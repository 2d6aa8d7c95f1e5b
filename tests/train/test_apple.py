"""Training on an Apple GPU, which has no float64."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.optim import AdamW

from loraover import LoraOverConfig, OverParameterization, Probe
from loraover.callbacks.diagnostics import core_numbers
from loraover.callbacks.step_norm import factors, step_norm
from loraover.overparam import sharding
from loraover.overparam.decompositions import DECOMPOSITIONS
from loraover.overparam.importance import SCORES, GradientScore

from support.apple import apple_gpu
from support.tiny_models import net_loss, tiny_net, trainable


@pytest.mark.parametrize("convert", [Tensor.double, lambda tensor: tensor.to(torch.float64)], ids=["double", "to"])
def test_the_stand_in_refuses_float64(convert: Any) -> None:
    with apple_gpu(model := tiny_net()):
        parameter = trainable(model)[0].detach()
        for tensor in (parameter, parameter + 1, torch.zeros(2, device=parameter.device), torch.zeros(2).to("mps")):
            assert tensor.device.type == "mps"
            with pytest.raises(TypeError, match="float64"):
                convert(tensor)
            assert convert(tensor.cpu()).device.type == "cpu"
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(2, dtype=torch.float64, device="mps")
        with pytest.raises(TypeError, match="float64"):
            parameter.to("cpu", torch.float64)


def trained(on_apple: bool, score: str, decomposition: str, schedule: str) -> dict[str, float]:
    """What a short run says of its cores, its scores and its change."""
    with apple_gpu(model) if (model := tiny_net()) and on_apple else nullcontext():
        rounds = {"rounds": 1, "start": 0.5} if schedule == "dynamic" else {}
        config = LoraOverConfig.model_validate(
            {"decomposition": decomposition, "schedule": schedule, "score": score, "budget": {"sites": 2}} | rounds
        )
        probe = Probe(model, range(2), net_loss)
        optimizer = AdamW(trainable(model), lr=1e-2, foreach=False)
        over = OverParameterization(model, config, steps=4, probe=probe).attach(optimizer)
        before = factors(model)
        for step in range(4):
            optimizer.zero_grad()
            net_loss(model, step).backward()
            optimizer.step()
            if isinstance(over.schedule.score, GradientScore):
                over.schedule.score.load(over.schedule.score.state())
        over.finish()
        assert len(over.injected) == 2
        numbers = core_numbers(over) | {"step_norm": step_norm(before, factors(model))}
        return numbers | over.schedule.rounds[0].scores


@pytest.mark.parametrize("schedule", ["static", "dynamic"])
@pytest.mark.parametrize("score", SCORES)
def test_every_score_is_that_of_a_cpu(score: str, schedule: str) -> None:
    found, expected = (trained(on_apple, score, "mpo", schedule) for on_apple in (True, False))
    assert all(map(math.isfinite, expected.values()))
    assert found == pytest.approx(expected, rel=1e-6)  # sums of some steps in float32, which is all that there is


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_every_decomposition_trains_as_on_a_cpu(decomposition: str) -> None:
    found, expected = (trained(on_apple, "fisher", decomposition, "dynamic") for on_apple in (True, False))
    assert found == pytest.approx(expected, rel=1e-6)  # sums of some steps in float32, which is all that there is


def test_rank_zeros_numbers_pass_through_an_apple_gpu_unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [math.pi, -1e-300, 0.0]

    def broadcast(shared: Tensor, src: int) -> None:
        assert shared.device.type == "mps"

    monkeypatch.setattr(sharding, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "broadcast", broadcast)
    with apple_gpu(tiny_net()):
        assert sharding.of_rank_zero(numbers, torch.device("mps")) == numbers
