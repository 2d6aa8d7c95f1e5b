"""Recipes whose LoRA is on experts: `lora.target_parameters`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from loraover.cli import cli
from loraover.common.command_line import run
from loraover.training.plan import make_plan
from loraover.training.recipe import load_recipe
from loraover.training.run_result import read_run
from loraover_export import fold_checkpoint

from support.resumed_run import assert_same_run, stopped
from support.tiny_experts import PARAMETERS
from support.tiny_hub import save_moe, write_recipe
from support.train_command import train
from support.trained_run import loss
from support.versions import needs_expert_stacks

pytestmark = needs_expert_stacks

LORA = {"target_modules": ["q_proj", "v_proj"], "target_parameters": PARAMETERS}
SHORT = {"max_steps": 5}  # a run that stops in step 3 resumes from 2


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_moe(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not interrupted, beside its recipe."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder / "recipe.yaml", moe, lora=LORA, training=SHORT)
    assert train(recipe, folder / "run") == 0
    return folder


def test_experts_are_trained_through_cores_and_folded(whole: Path, tmp_path: Path) -> None:
    result = read_run(whole / "run")
    assert loss(result.after) < loss(result.before) - 0.1
    report = fold_checkpoint(whole / "run" / "adapter", tmp_path / "folded", check_error=True)
    assert report.passed
    layers, parameters, experts = 2, 2, 4
    stacks = [matrix for matrix in report.matrices if ".experts." in matrix.name]
    assert len(stacks) == 2 * layers * parameters * experts  # A and B
    assert all(matrix.over_parameterised for matrix in stacks)


def test_a_run_that_was_interrupted_becomes_the_same(whole: Path, tmp_path: Path) -> None:
    folder = stopped(whole / "recipe.yaml", tmp_path / "run", step=3)
    assert train(whole / "recipe.yaml", folder, "--resume") == 0
    assert_same_run(folder, whole / "run")


def test_a_plan_counts_them(whole: Path) -> None:
    plan, result = make_plan(load_recipe(str(whole / "recipe.yaml"))), read_run(whole / "run")
    assert plan.adapter == 4 * result.lora_parameters
    assert plan.cores == 4 * result.trained_parameters == 4 * (result.lora_parameters + result.added_parameters)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"lora": {"target_parameters": [*PARAMETERS, "experts.gate"]}},
            "target_parameters: 'experts.gate' names no parameter of",
        ),
        ({"lora": {"target_parameters": []}}, "at least 1 item"),
        ({"lora": {"lora_dropout": 0.1}}, "PEFT refuses it: .* lora_dropout"),
    ],
)
def test_what_cannot_be_adapted_is_refused(
    parts: dict[str, Any], message: str, moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", moe, **{**parts, "lora": LORA | parts.get("lora", {})})
    assert run(cli, ["train", str(recipe), "-o", str(tmp_path / "run")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
