"""`loraover train --plan`: memory, steps and tokens before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loraover
import loraover.data.sources
from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import ConfigError, DataError
from loraover.models.load import load_model, load_tokenizer, resolve_model
from loraover.training.launch.memory import kept_bytes
from loraover.training.plan import TrainingPlan, make_plan
from loraover.training.recipe import Recipe, load_recipe
from loraover.training.trial import RunNeeds, extrapolated

from support.data_hub import DataHub
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


@pytest.fixture
def recipe(configs: dict[str, Path], tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", configs["llama"])


def plan(recipe: Path | str, overrides: dict[str, Any] | None = None, *, tries: bool = False) -> TrainingPlan:
    return make_plan(load_recipe(recipe, overrides), tries=tries)


@pytest.mark.process
@pytest.mark.parametrize(
    ("kind", "over"), [("t5", {}), ("llama", {"schedule": "dynamic", "budget": {"fraction": 0.5}, "rounds": 2})]
)
def test_a_plan_counts_what_a_run_trains(
    kind: str, over: dict[str, Any], bases: dict[str, Path], configs: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", bases[kind], over=over, evaluation={"examples": 0})
    found, result = plan(recipe, {"model": str(configs[kind])}), loraover.train(recipe, tmp_path / "run")
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
def test_a_plan_counts_bases_and_their_moments(bases: dict[str, Path], tmp_path: Path) -> None:
    over = {"decomposition": "eigen", "options": {"block": 16}}
    recipe = write_recipe(tmp_path / "recipe.yaml", bases["llama"], over=over, evaluation={"examples": 0})
    half = plan(recipe, {"over.budget": {"fraction": 0.5}, "over.schedule": "static"})
    found, result = plan(recipe), loraover.train(recipe, tmp_path / "run")
    assert 2 * result.gauge_numbers < found.gauge < 4 * result.gauge_numbers  # bases in float32, moments in bfloat16
    assert found.cores == found.adapter == 4 * result.lora_parameters
    assert found.gauge / 2 <= half.gauge < found.gauge


@pytest.mark.parametrize(("method", "trained"), [("lora", "adapter"), ("full", "weights")])
def test_a_plan_without_cores_has_the_moments_of_what_is_trained(method: str, trained: str, recipe: Path) -> None:
    found = plan(recipe, {"method": method})
    assert found.cores == 0
    assert found.optimizer_states == 2 * getattr(found, trained)
    assert found.gradients == getattr(found, trained)


@needs_meta_models
def test_bf16_halves_the_weights_and_not_the_adapter(recipe: Path) -> None:
    whole, half = (plan(recipe, {"training.bf16": is_half}) for is_half in (False, True))
    assert half.weights * 2 == whole.weights
    assert half.adapter == whole.adapter
    assert whole.activations is not None
    assert half.activations is not None
    assert 0.5 * whole.activations <= half.activations < 0.7 * whole.activations


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [pytest.param("llama", marks=needs_meta_models), "t5"])
def test_activations_are_what_autograd_keeps(kind: str, precision: str, bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", bases[kind], method="lora")
    found = plan(recipe, {"training.bf16": precision == "bf16"}, tries=True)
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


def test_a_base_in_four_bits_is_planned_in_four_bits(recipe: Path) -> None:
    whole, eight, four = (plan(recipe, {"model_init.quantization": form}) for form in (None, "int8", "nf4"))
    shared = whole.weights - 4 * (whole.weights - eight.weights) // 3  # embeddings and norms
    assert 0 < shared < eight.weights
    assert four.weights - shared == pytest.approx((eight.weights - shared) * 0.516, rel=1e-3)
    assert four.adapter == whole.adapter


def test_a_model_that_looks_at_values_is_planned_without_activations(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(self: Any, *_: Any, **__: Any) -> Any:
        return next(self.parameters()).max().item()

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", look)
    found = plan(recipe)
    assert found.activations is None
    assert found.facts()["activations"] == "unknown for this architecture"


@needs_meta_models
def test_checkpointing_keeps_less(configs: dict[str, Path], tmp_path: Path) -> None:
    for kind, config in configs.items():
        recipe = write_recipe(tmp_path / f"{kind}.yaml", config)
        whole, less = (plan(recipe, {"training.gradient_checkpointing": asked}) for asked in (False, True))
        assert less.activations is not None
        assert whole.activations is not None
        assert 0 < less.activations < whole.activations
        assert less.model_copy(update={"activations": whole.activations}) == whole


def test_an_epoch_of_a_file_counts_its_rows(configs: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"question": "a?", "sentence": "b", "label": 0}] * 70
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = {"model": str(configs["t5"]), "data.train": str(tmp_path / "rows.jsonl"), "evaluation.examples": 0}
    found = plan("glue-qnli-t5-base", local)
    assert found.lengths is not None
    assert found.lengths.longest < 128
    assert (found.steps, found.examples, found.tokens) == (3, 70, 70 * 2 * found.lengths.longest)
    twice = plan("glue-qnli-t5-base", local | {"training.num_train_epochs": 2})
    assert (twice.steps, twice.examples) == (6, 140)


@pytest.mark.process
def test_tokens_are_those_of_the_longest_examples(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"prompt": "1 + 1 =", "completion": " 2" * count} for count in range(1, 21)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {"max_length": 16, "max_steps": 6, "per_device_train_batch_size": 4}
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        bases["llama"],
        data={"train": str(tmp_path / "rows.jsonl"), "chat": False},
        training=training,
        evaluation={"examples": 0},
    )
    tokenizer = load_tokenizer(resolve_model(str(bases["llama"])))
    sizes = sorted(min(16, 1 + len(tokenizer("1 + 1 =" + row["completion"]).input_ids)) for row in rows)
    assert plan(recipe).tokens == sum(sizes) + sum(sizes[-4:])  # 24 examples are one epoch and 4 more


@pytest.mark.parametrize("method", ["lora", "lora-over"])
@pytest.mark.parametrize(("engine", "cuts"), [("ddp", ""), ("zero2", "m"), ("zero3", "wm"), ("fsdp2", "wm")])
def test_an_engine_gives_each_process_its_part(engine: str, cuts: str, method: str, recipe: Path) -> None:
    """A plan of an engine needs no launcher."""
    asked = {"method": method, "training.optim": "adamw_torch", "evaluation.exact_match": False}
    alone = plan(recipe, asked)
    found = plan(recipe, asked | {"distributed.engine": engine, "distributed.processes": 8})
    assert found.weights == (alone.weights // 8 if "w" in cuts else alone.weights)
    assert found.adapter == (alone.adapter // 8 if "w" in cuts else alone.adapter)
    assert (found.cores, found.activations) == (alone.cores, alone.activations)
    assert 0 <= found.gathered < alone.weights
    assert bool(found.gathered) == ("w" in cuts)
    assert found.gradients == alone.adapter // (8 if "m" in cuts else 1) + alone.cores
    if engine != "ddp" and method == "lora":  # ZeRO steps copies in float32 as well
        assert found.optimizer_states == (2 if engine == "fsdp2" else 3) * alone.adapter // 8
    elif engine in ("ddp", "fsdp2"):
        assert found.optimizer_states == alone.optimizer_states


def test_a_plan_for_gpus_that_are_not_here_says_whether_it_fits(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(recipe), "--plan", "--gpus", "8", "--set", "evaluation.exact_match=false"]
    assert run(cli, [*words, "--gpu-memory", "80"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "training.bf16" not in shown
    assert "fits into 72 GB of the 80 GB of each of 8 GPUs" in shown
    asked = [*words, "--gpu-memory", "1e-4", "--set", "distributed.engine=zero3", "--json"]
    assert run(cli, asked) == 0
    found = TrainingPlan.model_validate_json(capsys.readouterr().out)
    assert (found.gpus, found.memory, found.fits, found.step_seconds) == (8, 10**5, False, None)
    assert found.facts()["verdict"].startswith("does not fit into 90 kB of the 100 kB of each of 8 GPUs; ")


def test_what_a_plan_says_would_fit_fits(recipe: Path) -> None:
    room = 0.9 * 1.3e6
    found = make_plan(load_recipe(recipe, {"evaluation.exact_match": False}), gpus=2, gpu_memory=1.3e-3)
    assert found.fits is False
    assert found.remedies
    for remedy in found.remedies:
        changes: dict[str, Any] = {"evaluation.exact_match": False}
        for key, value in re.findall(r"(\S+): (\w+)", remedy):
            changes[key] = int(value) if value.isdecimal() else value == "true" if value in ("true", "false") else value
        gpus = int(match[1]) if (match := re.search(r"--gpus (\d+)|gpus=(\d+)", remedy)) else 2
        again = make_plan(load_recipe(recipe, changes), gpus=gpus, gpu_memory=1.3e-3)
        assert again.in_all <= room, remedy
        assert again.fits


def test_auto_takes_the_memory_of_the_planned_gpus(recipe: Path) -> None:
    auto = {"training.per_device_train_batch_size": "auto", "evaluation.exact_match": False}
    lines = {memory: Lines() for memory in (80.0, 1e-6)}
    for memory, report in lines.items():
        make_plan(load_recipe(recipe, auto), report, gpus=1, gpu_memory=memory)
    large, small = (next(line for line in report.lines if "batch_size: " in line) for report in lines.values())
    assert "batch_size: 8, which needs" in large
    assert "of 80 GB" in large
    assert "batch_size: 1, which needs" in small


def test_a_plan_for_gpus_without_their_memory_is_refused_where_there_is_none(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"no GPU here .*; give gpu_memory, in GB"):
        make_plan(load_recipe(recipe), gpus=8)


def test_steps_need_no_data(configs: dict[str, Path]) -> None:
    steps = {"training.max_steps": 10, "training.num_train_epochs": None}
    found = plan("metamath-gsm8k", {"model": str(configs["llama"])} | steps)
    assert (found.steps, found.examples, found.tokens) == (10, 320, 320 * 1024)


def test_an_epoch_of_the_hub_counts_what_the_hub_says(
    configs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = DataHub(monkeypatch, **{"nyu-mll/glue": []})
    recipe, report = load_recipe("glue-qnli-t5-base", {"model": str(configs["t5"])}), Lines()
    with pytest.raises(DataError, match=r"data\.train_examples or training\.max_steps"):
        make_plan(recipe)
    hub.counts["train"] = 104_743
    found = make_plan(recipe, report)
    assert (found.steps, found.examples) == (3274, 104_743)
    assert report.lines[0].endswith(": not read, since a plan downloads no data; the run checks rows")


@pytest.mark.process
@pytest.mark.parametrize(("kind", "name"), [("llama", "metamath-gsm8k"), ("t5", "glue-qnli-t5-base")])
def test_a_trial_has_rows_of_full_length_where_the_data_are_on_the_hub(
    kind: str, name: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: dict[str, set[int]] = {"prompt": set(), "completion": set()}

    def noted(asked: Recipe, output: Path, **options: Any) -> Any:
        tokenizer = load_tokenizer(resolve_model(asked.model))
        for row in map(json.loads, Path(asked.data.sources[0]).read_text().splitlines()):
            for part, found in lengths.items():
                found.add(min(64, len(tokenizer(row[part]).input_ids)))
        return loraover.train(asked, output, **options)

    monkeypatch.setattr("loraover.training.trial.train", noted)
    steps = {"training.max_steps": 9, "training.num_train_epochs": None, "training.max_length": 64}
    found = plan(name, {"model": str(bases[kind]), "training.bf16": False} | steps, tries=True)
    assert found.step_seconds is not None
    assert lengths["completion"] == {64}
    assert (lengths["prompt"] == {64}) == (kind == "t5")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"over.schedule": "static", "over.budget": {"sites": 9999}}, "budget.sites is 9999"),
        ({"training.optim": "adamw_torc"}, "did you mean 'adamw_torch'?"),
        ({"training.a": 1, "lora.b": 2, "lora.c": 3}, r"training\.a: unknown.*lora\.b: unknown.*lora\.c: unknown key"),
    ],
)
def test_what_a_run_would_refuse_has_no_plan(changes: dict[str, Any], message: str, recipe: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(recipe, changes)


def test_a_plan_is_shown_with_its_assumption_and_leaves_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert run(cli, ["train", str(recipe), "--plan", "-o", "run"]) == 0
    shown = capsys.readouterr().out
    for word in ("weights", "A and B", "cores", "optimizer states", "activations", "steps", "tokens", "micro-batch"):
        assert word in shown
    assert run(cli, ["train", str(recipe), "--plan", "--json"]) == 0
    assert TrainingPlan.model_validate_json(capsys.readouterr().out) == plan(recipe)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.process
def test_a_page_shows_the_lengths_of_the_examples(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", bases["llama"], training={"max_length": 96})
    call = ["train", str(recipe), "--plan", "--html", "plan.html"]
    assert run(cli, call) == 0
    page, lengths = Path("plan.html").read_text(), plan(recipe).lengths
    assert lengths is not None
    assert f"max_length 96 cuts {lengths.cut} of 20 examples." in page
    for edge, count in lengths.histogram.items():
        assert re.search(rf">up to {edge} tokens</text><text[^>]*>{count}</text>", page)
    assert "--plan --html plan.html</pre>" in page
    assert run(cli, call) == 2
    assert run(cli, [*call[:2], *call[3:]]) == 2
    assert "--plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("steps", "time"), [(4, "0.08 s in all"), (3000, "1.0 min in all"), (30, "0.6 s in all"), (360_000, "2.0 h in all")]
)
def test_a_time_is_never_zero(steps: int, time: str, recipe: Path) -> None:
    found = plan(recipe).model_copy(update={"step_seconds": 0.02, "steps": steps})
    assert found.facts()["time"] == f"about 0.02 s a step, {time} without evaluation"
