"""`loraover train --plan`: memory, steps and tokens before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file

import loraover.data.sources
import loraover.models.load
from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import DataError
from loraover.models.load import load_model, resolve_model
from loraover.sources.hub import HubUnreachableError
from loraover.training.estimate import kept_bytes
from loraover.training.plan import TrainingPlan, make_plan
from loraover.training.recipe import load_recipe
from loraover.training.run_result import read_run
from loraover.training.trial import RunNeeds, extrapolated

from support.lines import Lines
from support.tiny_hub import write_recipe
from support.tiny_models import with_lora
from support.versions import needs_meta_models


@pytest.fixture
def configs(bases: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The models' config.json and nothing else of them."""
    for kind, folder in bases.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_bytes((folder / "config.json").read_bytes())
    return {kind: tmp_path / kind for kind in bases}


def plan(recipe: Path | str, capsys: pytest.CaptureFixture[str], *options: object) -> TrainingPlan:
    assert run(cli, ["train", str(recipe), "--plan", "--json", *map(str, options)]) == 0
    return TrainingPlan.model_validate_json(capsys.readouterr().out)


@pytest.mark.process
@pytest.mark.parametrize(
    ("kind", "over"), [("t5", {}), ("llama", {"schedule": "dynamic", "budget": {"fraction": 0.5}, "rounds": 2})]
)
def test_a_plan_counts_what_a_run_trains(
    kind: str,
    over: dict[str, Any],
    bases: dict[str, Path],
    configs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", bases[kind], over=over, evaluation={"examples": 0})
    found = plan(recipe, capsys, "--model", configs[kind])
    assert run(cli, ["train", str(recipe), "-o", str(tmp_path / "run")]) == 0
    result = read_run(tmp_path / "run")
    assert found.steps == result.steps
    assert found.adapter == 4 * result.lora_parameters
    stored = load_file(tmp_path / "run" / "adapter" / "loraover.safetensors")
    held = 4 * sum(core.numel() for name, core in stored.items() if name.rpartition(".core.")[2].isdigit())
    states = 8 * (result.lora_parameters + result.added_parameters)
    if over:
        assert held <= found.cores <= 3 * held
        assert states <= found.optimizer_states <= 1.2 * states
    else:
        assert (found.cores, found.optimizer_states) == (held, states)


@pytest.mark.process
def test_a_plan_counts_bases_and_their_moments(
    bases: dict[str, Path], configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over = {"decomposition": "eigen", "options": {"block": 16}}
    recipe = write_recipe(tmp_path / "recipe.yaml", bases["llama"], over=over, evaluation={"examples": 0})
    half = plan(recipe, capsys, "--set", "over.budget={fraction: 0.5}", "--set", "over.schedule=static")
    found = plan(recipe, capsys, "--model", configs["llama"])
    assert run(cli, ["train", str(recipe), "-o", str(tmp_path / "run")]) == 0
    result = read_run(tmp_path / "run")
    assert found.gauge == 4 * result.gauge_numbers > 0
    assert found.cores == found.adapter == 4 * result.lora_parameters
    assert found.gauge / 2 <= half.gauge < found.gauge


@pytest.mark.parametrize(("method", "trained"), [("lora", "adapter"), ("full", "weights")])
def test_a_plan_without_cores_has_the_moments_of_what_is_trained(
    method: str, trained: str, configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", configs["llama"], method=method)
    found = plan(recipe, capsys)
    assert found.cores == 0
    assert found.optimizer_states == 2 * getattr(found, trained)
    assert found.gradients == getattr(found, trained)


@needs_meta_models
def test_bf16_halves_the_weights_and_not_the_adapter(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", configs["llama"])
    whole, half = (plan(recipe, capsys, "--set", f"training.bf16={p}") for p in ("false", "true"))
    assert half.weights * 2 == whole.weights
    assert half.adapter == whole.adapter
    assert whole.activations is not None
    assert half.activations is not None
    assert 0.5 * whole.activations <= half.activations < 0.7 * whole.activations


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [pytest.param("llama", marks=needs_meta_models), "t5"])
def test_activations_are_what_autograd_keeps(
    kind: str, precision: str, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", bases[kind], method="lora")
    found = plan(recipe, capsys, "--set", f"training.bf16={precision == 'bf16'}")
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    base = load_model(resolve_model(str(bases[kind])), task_type=task, dtype=precision)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    held = kept_bytes(with_lora(base, task_type=task).train(), torch.ones(4, 128, dtype=torch.long), autocast)
    assert found.activations == pytest.approx(held, rel=0.1)
    assert found.step_seconds is not None
    assert 0 < found.step_seconds < 60
    assert found.peak_bytes is not None
    assert found.peak_bytes > found.weights


def test_layers_that_were_not_tried_need_what_the_others_do() -> None:
    assert extrapolated(RunNeeds(3.0, 50), RunNeeds(5.0, 90), tried=6, layers=32) == (5 + 26 * 0.5, 90 + 26 * 10)
    assert extrapolated(RunNeeds(3.0, 50), RunNeeds(3.0, 50), tried=2, layers=2) == (3, 50)


def test_a_base_in_four_bits_is_planned_in_four_bits(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", configs["llama"])
    whole, eight, four = (
        plan(recipe, capsys, "--set", f"model_init.quantization={form}") for form in ("null", "int8", "nf4")
    )
    shared = whole.weights - 4 * (whole.weights - eight.weights) // 3  # embeddings and norms
    assert 0 < shared < eight.weights
    assert four.weights - shared == pytest.approx((eight.weights - shared) * 0.516, rel=1e-3)
    assert four.adapter == whole.adapter


def test_a_model_that_looks_at_values_is_planned_without_activations(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(self: Any, *_: Any, **__: Any) -> Any:
        return next(self.parameters()).max().item()

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", look)
    recipe = write_recipe(tmp_path / "recipe.yaml", configs["llama"])
    assert plan(recipe, capsys).activations is None
    assert run(cli, ["train", str(recipe), "--plan"]) == 0
    assert "unknown for this architecture" in capsys.readouterr().out


@needs_meta_models
def test_checkpointing_keeps_less(configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, config in configs.items():
        recipe = write_recipe(tmp_path / f"{kind}.yaml", config)
        whole = plan(recipe, capsys)
        less = plan(recipe, capsys, "--set", "training.gradient_checkpointing=true")
        assert less.activations is not None
        assert whole.activations is not None
        assert 0 < less.activations < whole.activations
        measured = {name: getattr(whole, name) for name in ("activations", "step_seconds", "peak_bytes")}
        assert less.model_copy(update=measured) == whole


def test_an_epoch_of_a_file_counts_its_rows(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": "a?", "sentence": "b", "label": 0}] * 70
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = ["--model", configs["t5"], "--data", tmp_path / "rows.jsonl", "--set", "evaluation.examples=0"]
    found = plan("glue-qnli-t5-base", capsys, *local)
    assert (found.steps, found.examples, found.tokens) == (3, 70, 70 * 2 * 128)
    twice = plan("glue-qnli-t5-base", capsys, *local, "--set", "training.num_train_epochs=2")
    assert (twice.steps, twice.examples) == (6, 140)


def test_steps_need_no_data(configs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = plan("metamath-gsm8k", capsys, "--model", configs["llama"], "--steps", 10)
    assert (found.steps, found.examples, found.tokens) == (10, 320, 320 * 1024)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Sizes of splits, as the hub tells them."""
    splits: dict[str, Any] = {}
    monkeypatch.setattr(loraover.data.sources, "pinned_commit", lambda *_: "c" * 40)
    info = SimpleNamespace(info=SimpleNamespace(splits=splits))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: info)
    return splits


def test_an_epoch_of_the_hub_counts_what_the_hub_says(
    hub: dict[str, Any], configs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    hub["train"] = SimpleNamespace(num_examples=104_743)
    found = plan("glue-qnli-t5-base", capsys, "--model", configs["t5"])
    assert (found.steps, found.examples) == (3274, 104_743)


def test_a_plan_says_that_it_reads_no_rows_of_the_hub(hub: dict[str, Any], configs: dict[str, Path]) -> None:
    hub["train"], report = SimpleNamespace(num_examples=8), Lines()
    make_plan(load_recipe("glue-qnli-t5-base", {"model": str(configs["t5"])}), report)
    assert report.lines[0].endswith(": not read, since a plan downloads no data; the run checks rows")


def test_a_size_that_the_hub_does_not_say_is_asked_for(hub: dict[str, Any], configs: dict[str, Path]) -> None:
    recipe = load_recipe("glue-qnli-t5-base", {"model": str(configs["t5"])})
    with pytest.raises(DataError, match=r"data\.train_examples or training\.max_steps"):
        make_plan(recipe)


def test_a_hub_that_cannot_be_reached_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(name: str, *_: object) -> str:
        raise HubUnreachableError(f"model {name!r}: the hub cannot be reached and its cache holds no copy.")

    monkeypatch.setattr(loraover.models.load, "pinned_commit", unreachable)
    assert run(cli, ["train", "metamath-gsm8k", "--plan"]) == 2
    assert "'meta-llama/Llama-2-7b-hf': the hub cannot be reached" in capsys.readouterr().err


def test_a_schedule_that_does_not_fit_is_refused_before_anything_is_loaded(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over = {"schedule": "static", "budget": {"sites": 9999}}
    recipe = write_recipe(tmp_path / "recipe.yaml", configs["llama"], over=over)
    assert run(cli, ["train", str(recipe), "--plan"]) == 2
    assert "budget.sites is 9999" in capsys.readouterr().err


def test_what_a_run_would_refuse_has_no_plan(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", configs["llama"])
    assert run(cli, ["train", str(recipe), "--plan", "--set", "training.optim=adamw_torc"]) == 2
    assert "did you mean 'adamw_torch'?" in capsys.readouterr().err


def test_a_plan_is_shown_with_its_assumption_and_leaves_nothing(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", configs["llama"])
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert run(cli, ["train", str(recipe), "--plan", "-o", "run"]) == 0
    shown = capsys.readouterr().out
    for word in ("weights", "A and B", "cores", "optimizer states", "activations", "steps", "tokens", "micro-batch"):
        assert word in shown
    assert sorted(tmp_path.rglob("*")) == before
