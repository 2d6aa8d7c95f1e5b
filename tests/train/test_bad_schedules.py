"""Schedules that do not fit the run are refused before the first step, with advice on what to change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from loraover import Budget, LoraOverConfig, OverParameterization, Probe
from loraover.checkpoint import checkpoint, training_state
from loraover.common.errors import CheckpointError, ConfigError
from loraover.training.recipe import load_recipe

from support.make_checkpoint import Made, adamw, make_checkpoint, reopened
from support.tiny_models import (
    batch_loss,
    lora_matrices,
    net_batch,
    net_loss,
    tiny_llama,
    tiny_net,
    trainable,
    with_lora,
)

BATCHES = [net_batch(seed) for seed in range(2)]


# Configurations that contradict themselves

CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "two budgets": (
        {"schedule": "static", "budget": {"sites": 2, "fraction": 0.5}},
        "give one of sites, fraction and parameters, found sites, fraction",
    ),
    "an empty budget": (
        {"schedule": "static", "budget": {}},
        "give one of sites, fraction and parameters, found none",
    ),
    "static without a budget": ({"schedule": "static"}, "schedule 'static' takes a budget"),
    "all with a budget": ({"budget": {"sites": 2}}, "schedule 'all' takes no budget"),
    "a fraction above one": ({"schedule": "static", "budget": {"fraction": 1.1}}, "less than or equal to 1"),
    "a misspelt unit": ({"schedule": "static", "budget": {"site": 2}}, "budget.site: "),
    "a misspelt score": ({"score": "fischer"}, "score is 'fischer'; did you mean 'fisher'?"),
    "a score of another kind": ({"score": "xyz"}, "expected one of fisher, taylor, sensitivity, loss_impact, random"),
    "start after end": ({"start": 0.6}, "start is 0.6, after end, which is 0.5"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_refused_in_python_and_in_a_recipe(case: str) -> None:
    options, said = CONTRADICTIONS[case]
    with pytest.raises(ConfigError) as refusal:
        load_recipe("demo", {"method": "lora-over", "over": options})
    assert said in str(refusal.value)
    with pytest.raises(ValueError, match="LoraOverConfig"):
        LoraOverConfig(**options)


# Schedules that fit neither the model nor the run

UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "more sites than there are": (
        {"schedule": "static", "budget": Budget(sites=7)},
        r"budget\.sites is 7, but there are 6 candidate sites",
    ),
    "fewer parameters than the cheapest": (
        {"schedule": "static", "budget": Budget(parameters=1)},
        r"budget\.parameters is 1; the cores of one site add at least \d+ parameters, those of all 6 candidates \d+",
    ),
    "parameters where none are added": (
        {"decomposition": "eigen", "schedule": "static", "budget": Budget(parameters=100)},
        r"budget\.parameters counts trained numbers, of which eigen adds none; give budget\.sites or",
    ),
    "more rounds than steps": (
        {"schedule": "dynamic", "budget": Budget(sites=6), "rounds": 6, "end": 0.9},
        "6 rounds from 0.1 to 0.9 of 4 steps would take place after steps 1, 1, 2, 2, 3, 4; they must differ",
    ),
    "dynamic without the number of steps": (
        {"schedule": "dynamic", "budget": Budget(sites=2), "steps": None},
        "give the number of optimizer steps with `steps`",
    ),
    "static without batches": (
        {"schedule": "static", "budget": Budget(sites=2), "probe": False},
        "schedule static with score fisher runs the model on calibration batches",
    ),
    "loss_impact without batches": (
        {"schedule": "dynamic", "budget": Budget(sites=2), "score": "loss_impact", "rounds": 2, "probe": False},
        "schedule dynamic with score loss_impact runs the model on calibration batches",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_schedule_that_does_not_fit_is_refused_before_the_first_step(case: str) -> None:
    options, said = UNFIT[case]
    config = {key: value for key, value in options.items() if key not in ("steps", "probe")}
    batches = options.get("probe", BATCHES)
    model = tiny_net()
    before, optimizer = lora_matrices(model), AdamW(trainable(model))
    probe = None if batches is False else Probe(model, batches, batch_loss)
    steps = options.get("steps", 4)
    with pytest.raises(ConfigError, match=said):
        OverParameterization(model, LoraOverConfig(**config), steps=steps, probe=probe).attach(optimizer)
    assert_untouched(model, before, optimizer)


def assert_untouched(model: nn.Module, before: dict[str, Tensor], optimizer: Any) -> None:
    assert all(torch.equal(matrix, before[key]) for key, matrix in lora_matrices(model).items())
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 0


# Optimizers


def test_an_optimizer_without_a_site_that_a_later_round_could_choose_is_refused() -> None:
    model = tiny_net()
    over = OverParameterization(model, LoraOverConfig(schedule="dynamic", budget=Budget(sites=2)), steps=10)
    with pytest.raises(ConfigError, match=r"does not hold third\.lora_B"):
        over.attach(SGD(trainable(model)[:-1], lr=0.1))


def test_two_on_one_optimizer_are_refused() -> None:
    model = tiny_net()
    optimizer = SGD(trainable(model), lr=0.1)
    first = OverParameterization(model, LoraOverConfig(sites=["first.*"])).attach(optimizer)
    second = OverParameterization(model, LoraOverConfig(sites=["second.*"]))
    with pytest.raises(ConfigError, match=r"another OverParameterization trains .* already; one callback is enough"):
        second.attach(optimizer)
    net_loss(model).backward()
    optimizer.step()
    first.finish()
    second.attach(optimizer)


# Resuming

CONFIG = LoraOverConfig(schedule="dynamic", score="taylor", budget=Budget(sites=4), rounds=2, start=0.2, seed=5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_checkpoint(tmp_path_factory.mktemp("made"), config=CONFIG, steps=3, total=10)


def test_resuming_with_another_configuration_is_refused(made: Made) -> None:
    with pytest.raises(CheckpointError, match="resume with the same configuration or start anew"):
        reopened(made, adamw, CONFIG.model_copy(update={"rounds": 3}), total=10)


def test_resuming_with_another_optimizer_is_refused(made: Made) -> None:
    with pytest.raises(ConfigError, match="the optimizer is SGD; resume with AdamW"):
        reopened(made, lambda parameters: SGD(parameters, lr=0.1), total=10)


@pytest.mark.parametrize("steps", [9, None])
def test_resuming_a_dynamic_schedule_of_another_length_is_refused(steps: int | None, made: Made) -> None:
    with pytest.raises(CheckpointError, match=f"laid out for 10 steps, this run has {steps}"):
        reopened(made, adamw, total=steps)


def test_a_longer_run_may_go_on_where_nothing_depends_on_its_length(tmp_path: Path) -> None:
    reopened(make_checkpoint(tmp_path, total=10), adamw, total=20)


def test_resuming_with_another_base_model_is_refused(made: Made, tmp_path: Path) -> None:
    other = Path(shutil.copytree(made.base, tmp_path / "other"))
    said = rf"was trained on {made.base}, the model was loaded from {other}; load that one"
    with pytest.raises(CheckpointError, match=said):
        reopened(replace(made, base=other), adamw, total=10)


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "another rank": (
        lambda: with_lora(tiny_llama(), r=2, target_modules=["q_proj", "v_proj"]),
        r"lora_[AB] is \d+ x \d+, in the model it is \d+ x \d+; resume with the adapter's own LoraConfig",
    ),
    "other modules": (
        lambda: with_lora(tiny_llama(), target_modules=["up_proj"]),
        r"the model lacks 2 of its sites, first model\.layers\.",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_resuming_another_model_is_refused(case: str, made: Made) -> None:
    model, said = MODELS[case]
    over = OverParameterization(model(), CONFIG, steps=10, inject=False)
    with pytest.raises(CheckpointError, match=said):
        training_state.restore(over, checkpoint.read_checkpoint(made.path))
