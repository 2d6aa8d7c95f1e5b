"""Measurements of steps and cores in a Trainer's log."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils

from loraover import DiagnosticsCallback, LoraOverCallback, LoraOverConfig, OverParameterization
from loraover.callbacks.diagnostics import PREFIX, core_numbers
from loraover.callbacks.step_norm import factors, step_norm

from support.hf_trainer import DATA, arguments, llama
from support.tiny_models import tiny_net

pytestmark = pytest.mark.process

STEPS = 5


def trained(folder: Path, over: LoraOverCallback | None, adapter: str = "default", **changes: Any) -> Trainer:
    args = arguments(folder, **({"max_steps": STEPS, "logging_steps": 2} | changes))
    model = llama(adapter=adapter)
    trainer = Trainer(model, args, train_dataset=DATA, eval_dataset=DATA[:4], callbacks=[] if over is None else [over])
    DiagnosticsCallback(over).add_to(trainer)
    trainer.train()
    return trainer


def logged(trainer: Trainer, name: str) -> dict[int, float]:
    return {row["step"]: row[PREFIX + name] for row in trainer.state.log_history if PREFIX + name in row}


def dense(model: Any) -> Tensor:
    parts = [found.scaling * (found.b @ found.a) for found in factors(model).values()]
    return torch.cat([part.flatten() for part in parts])


def test_the_step_norm_is_the_dense_one() -> None:
    model = tiny_net()
    before, dense_before = factors(model), dense(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    expected = float((dense(model) - dense_before).norm())
    assert step_norm(before, factors(model)) == pytest.approx(expected, rel=1e-9)
    assert step_norm(before, before) == 0


@pytest.mark.parametrize("adapter", ["default", "math"])
def test_every_logged_step_has_its_numbers(adapter: str, tmp_path: Path) -> None:
    trainer = trained(tmp_path, LoraOverCallback(), adapter)
    norms = logged(trainer, "step_norm")
    assert list(norms) == [2, 4]
    assert all(norm > 0 for norm in norms.values())
    assert logged(trainer, "injected_sites") == dict.fromkeys([2, 4], 28)
    assert logged(trainer, "added_parameters")[2] > 0
    assert 0 < logged(trainer, "added_share")[2] < 1
    conditions = logged(trainer, "gauge_condition")
    assert 1 < conditions[2] < conditions[4]


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, [6, 12]),
        ({"logging_strategy": "no"}, []),
        ({"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 3}, [1, 2, 3]),
    ],
    ids=["epoch", "no", "evaluated"],
)
def test_numbers_are_of_the_step_that_is_logged(tmp_path: Path, changes: dict[str, Any], steps: list[int]) -> None:
    each = trained(tmp_path / "each", None, **(changes | {"logging_strategy": "steps", "logging_steps": 1}))
    trainer = trained(tmp_path / "some", None, **changes)
    expected = logged(each, "step_norm")
    assert logged(trainer, "step_norm") == {step: expected[step] for step in steps}
    assert len(set(expected.values())) == len(expected) >= 3
    assert logged(trainer, "centre_norm") == {}


def test_they_reach_every_tracker_and_the_trainers_own_record(tmp_path: Path) -> None:
    told: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            told.append(dict(logs or {}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", Tracker)
        trainer = trained(tmp_path, LoraOverCallback(), report_to=["tensorboard", "mlflow"])
    assert [row[PREFIX + "step_norm"] for row in told if "loss" in row] == list(logged(trainer, "step_norm").values())
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    found = {event.step: event.value for event in events.Scalars(f"train/{PREFIX}step_norm")}
    assert found == pytest.approx(logged(trainer, "step_norm"), rel=1e-6)
    trainer.save_state()
    record = json.loads((tmp_path / "trainer_state.json").read_text())
    assert PREFIX + "gauge_condition" in record["log_history"][0]


@pytest.mark.parametrize("decomposition", ["mpo", "svd", "chain"])
def test_the_gauge_is_isometric_at_injection(decomposition: str) -> None:
    over = OverParameterization(tiny_net(), LoraOverConfig(decomposition=decomposition))
    numbers = core_numbers(over)
    assert numbers["gauge_condition"] == pytest.approx(1.0, abs=1e-5)
    matrices = [site.parameter.detach().double() for site in over.sites.values()]
    assert numbers["centre_norm"] == pytest.approx(math.sqrt(sum(float(m.square().sum()) for m in matrices)), rel=1e-5)
    cores, plain = over.num_parameters()
    assert numbers["added_share"] == pytest.approx((cores - plain) / plain)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_cores_that_have_diverged_have_numbers_that_say_so(value: float) -> None:
    over = OverParameterization(tiny_net(), LoraOverConfig())
    with torch.no_grad():
        over.groups[0].stacks[0][0].fill_(value)
    assert math.isnan(core_numbers(over)["gauge_condition"])
