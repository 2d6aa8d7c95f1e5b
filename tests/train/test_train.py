"""`loraover train` from recipe to run folder, on tiny models, and `loraover compare` of its runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

import loraover_export.cli
from loraover import read_checkpoint
from loraover.cli import cli
from loraover.common.command_line import run
from loraover.models.load import load_config, resolve_model
from loraover.training.launch.defaults import with_defaults
from loraover.training.recipe import load_recipe
from loraover.training.run.build import note_slow_precision
from loraover.training.run_result import RunResult, read_run

from support.lines import Lines
from support.machine import with_cpu
from support.tiny_hub import write_recipe
from support.tiny_models import lora_matrices, update_norm
from support.train_command import METHODS, STEPS, data_file, train
from support.trained_run import MODELS, Trained, loss, losses, matrices, metrics

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_network")]


@pytest.fixture(params=[(kind, method) for kind in MODELS for method in METHODS], ids="-".join)
def done(request: pytest.FixtureRequest, trained: dict[tuple[str, str], Trained]) -> Trained:
    return trained[request.param]


@pytest.fixture(params=MODELS)
def over(request: pytest.FixtureRequest, trained: dict[tuple[str, str], Trained]) -> Trained:
    return trained[request.param, "lora-over"]


# What a run leaves


def test_a_run_folder_holds_what_it_should(done: Trained) -> None:
    names = {path.name for path in done.folder.iterdir()}
    assert names == {"recipe.yaml", "data.json", "metrics.jsonl", "held_out.json", "run.json", "trainer", "adapter"}
    adapter = {path.name for path in done.adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= adapter
    assert ({"loraover.json", "loraover.safetensors"} <= adapter) is (done.method == "lora-over")
    assert not [path for path in done.adapter.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert not [*done.folder.rglob("*.tmp"), *done.folder.rglob("*tfevents*")]
    checkpoints = {path.name for path in (done.folder / "trainer").glob("checkpoint-*")}
    assert checkpoints == {"checkpoint-2", "checkpoint-4"}


def test_the_command_says_where_the_model_is(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    settings = ("--set", "evaluation.before=false", "--set", "training.bf16=true")
    assert train(recipe, out, "--method", "full", "--steps", 1, *settings) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[printed.index("Next:") - 1] == f"model: {out / 'model'}"
    assert any("numbers are trained in bfloat16" in line for line in printed)
    assert (out / "model" / "README.md").is_file()


def test_the_result_is_what_happened(done: Trained) -> None:
    result = done.result
    assert (result.method, result.model, result.steps, result.seed) == (done.method, str(done.base), STEPS, 0)
    assert result.learning_rate == 1e-2
    assert "word problems, seed 0" in result.data_origin
    assert result.train_seconds > 0
    assert result.timed_steps == STEPS
    assert result.peak_bytes > 2**26
    assert {"loraover", "python", "torch", "transformers", "peft"} <= result.versions.keys()
    assert loss(result.after) < loss(result.before)
    scored = json.loads((done.folder / "held_out.json").read_text())
    assert len(scored) == 4
    assert loss(result.after) == pytest.approx(sum(nats for nats, _ in scored) / sum(tokens for _, tokens in scored))
    assert result.before is not None
    assert result.before.examples == 4
    assert result.before.exact_match is not None
    assert 0 <= result.before.exact_match <= 1


def test_the_result_counts_parameters(done: Trained) -> None:
    assert done.result.lora_parameters == sum(tensor.numel() for tensor in matrices(done.folder).values())
    if done.method == "lora":
        assert done.result.added_parameters == 0
        return
    cores = {
        name: tensor
        for name, tensor in load_file(done.adapter / "loraover.safetensors").items()
        if name.rpartition(".core.")[2].isdigit()
    }
    added = sum(tensor.numel() for tensor in cores.values()) - done.result.lora_parameters
    assert done.result.added_parameters == added > 0


def test_every_step_is_in_the_metrics(done: Trained) -> None:
    rows = metrics(done.folder)
    assert list(losses(done.folder)) == [1, 2, 3, 4]
    assert all(row["learning_rate"] > 0 for row in rows if "loss" in row)
    evaluated = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    assert evaluated == [(0, loss(done.result.before)), (STEPS, loss(done.result.after))]
    assert losses(done.folder)[4] < losses(done.folder)[1]


def test_the_recipe_that_was_run_gives_the_same_run_again(over: Trained, tmp_path: Path) -> None:
    assert load_recipe(str(over.folder / "recipe.yaml")).method == over.method
    again = tmp_path / "again"
    assert train(over.folder / "recipe.yaml", again) == 0
    assert losses(again) == losses(over.folder)
    assert (again / "recipe.yaml").read_bytes() == (over.folder / "recipe.yaml").read_bytes()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / "adapter" / name).read_bytes() == (over.adapter / name).read_bytes()


def test_peft_loads_the_adapter_that_was_trained(done: Trained) -> None:
    model = done.load()
    trained = lora_matrices(done.trainer.model)
    loaded = lora_matrices(model)
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    assert any(not torch.equal(trained[name], done.start[name]) for name in trained)
    assert update_norm(model) == pytest.approx(done.result.update_norm, rel=1e-12)
    assert update_norm(model) > 0
    assert model.peft_config["default"].base_model_name_or_path == str(done.base)
    assert transformers.AutoTokenizer.from_pretrained(done.adapter).pad_token_id is not None


def test_the_adapter_is_a_checkpoint_that_folds(over: Trained, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(over.adapter)
    assert checkpoint.meta.step == STEPS
    assert len(checkpoint.sites) == len(over.start)
    folded = tmp_path / "folded"
    assert run(loraover_export.cli.cli, ["fold", str(over.adapter), "-o", str(folded), "--check-error"]) == 0
    certificate = json.loads((folded / "fold_certificate.json").read_text())
    assert certificate["verdict"] == "passed"
    assert certificate["outputs"]["adapter_effect"] > 100 * certificate["output_bound"]
    assert update_norm(over.load(folded)) == pytest.approx(over.result.update_norm, rel=1e-6)


def test_the_model_card_states_the_facts(done: Trained) -> None:
    card = (done.adapter / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == str(done.base)
    for value in (done.method, f"{done.result.lora_parameters:,}", "word problems"):
        assert f" {value}" in card


# The command


def test_flags_reach_the_recipe(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "1+1?", "completion": "2"}
    train_file = data_file(tmp_path / "train.jsonl", *[row] * 4)
    test_file = data_file(tmp_path / "test.jsonl", row, row | {"prompt": "3-1?"})
    options = {
        "--method": "lora",
        "--model": bases["llama"],
        "--data": train_file,
        "--test-data": test_file,
        "--steps": 2,
        "--learning-rate": 0.5,
        "--seed": 7,
        "--set": "lora.r=2",
    }
    recipe = write_recipe(tmp_path / "recipe.yaml", "absent")
    flags = [part for pair in options.items() for part in pair]
    assert train(recipe, tmp_path / "out", *flags, "--set", "evaluation.exact_match=false") == 0
    ran = load_recipe(str(tmp_path / "out" / "recipe.yaml"))
    assert (ran.method, ran.model, ran.lora.r) == ("lora", str(bases["llama"]), 2)
    assert (ran.data.train, ran.data.test) == (str(train_file), str(test_file))
    assert (ran.training.max_steps, ran.training.learning_rate, ran.training.seed) == (2, 0.5, 7)
    after = read_run(tmp_path / "out").after
    assert after is not None
    assert after.exact_match is None
    assert "1 of 2 held-out examples are also trained on" in capsys.readouterr().out


@pytest.mark.parametrize(("answer", "is_measured"), [("number", False), ("text", True)])
def test_answers_without_numbers_are_not_judged_by_numbers(
    answer: str, is_measured: bool, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "Is it?", "completion": " yes"}, {"prompt": "Is it not?", "completion": " no"}]
    test_file = data_file(tmp_path / "test.jsonl", *rows)
    asked = ("--test-data", test_file, "--set", f"evaluation.answer={answer}", "--steps", 1)
    assert train(recipe, tmp_path / "out", *asked) == 0
    after = read_run(tmp_path / "out").after
    assert after is not None
    assert (after.exact_match is not None) is is_measured
    assert ("no held-out completion has a number" in capsys.readouterr().out) is not is_measured


@pytest.mark.parametrize(
    ("capability", "has_amx", "lines"),
    [("AVX2", False, 1), ("AVX512", False, 1), ("AVX512", True, 0), ("SVE256", False, 0)],
)
def test_bf16_on_a_cpu_that_is_slow_in_it_is_reported(
    capability: str, has_amx: bool, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cpu(monkeypatch, has_amx, capability)
    note_slow_precision(load_recipe("demo", {"training.bf16": True}), said := Lines())
    assert [f"this CPU ({capability}, without AMX) is slow" in line for line in said.lines] == [True] * lines


BF16 = {
    "a CPU with AMX": (True, {}, True, "this machine's cpu is faster in it than in float32"),
    "a CPU without AMX": (False, {}, False, "this machine's cpu is not known to be faster in it"),
    "fp16": (True, {"training.fp16": True}, False, "training.fp16 is true"),
    "a method in float32": (True, {"method": "federated"}, False, "method federated computes in float32"),
}


@pytest.mark.parametrize(("has_amx", "settings", "is_used", "why"), BF16.values(), ids=BF16)
def test_bf16_is_the_default_where_it_is_faster(
    has_amx: bool, settings: Mapping[str, Any], is_used: bool, why: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cpu(monkeypatch, has_amx)
    config = load_config(resolve_model(str(base)))
    found = with_defaults(load_recipe("demo", settings), config, [], said := Lines())
    assert found.training.bf16 is is_used
    assert f"training.bf16: {str(is_used).lower()}, since {why}" in said.lines


def test_nothing_is_measured_without_held_out_data(recipe: Path, tmp_path: Path) -> None:
    assert train(recipe, tmp_path / "out", "--set", "evaluation.examples=0") == 0
    result = read_run(tmp_path / "out")
    assert result.before is None
    assert result.after is None
    assert list(losses(tmp_path / "out")) == [1, 2, 3, 4]


def test_progress_is_printed_without_json(recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(recipe, tmp_path / "out") == 0
    printed = capfd.readouterr().out
    for step in range(1, STEPS + 1):
        assert re.search(rf"step     {step}/{STEPS}  loss [\d.]+, (.* tokens/s, )?peak [\d.]+ GB", printed)
    assert len(re.findall(r"tokens/s.* left$", printed, re.MULTILINE)) == STEPS - 2  # the first has no rate
    assert f"adapter: {tmp_path / 'out' / 'adapter'}" in printed.splitlines()
    assert "\x1b" not in printed
    assert re.search(r"^measuring the held-out loss before training, examples: \d+$", printed, re.MULTILINE)
    capfd.readouterr()
    assert run(cli, ["inspect", str(tmp_path / "out")]) == 0
    inspected = capfd.readouterr().out
    assert "loraover export fold" in inspected
    assert printed.endswith(inspected[inspected.index("Next:") :]), "the steps that inspect names"


def test_tensorboard_writes_events_into_the_run(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train(recipe, tmp_path / "out", "--set", "training.report_to=tensorboard") == 0
    found: dict[int, float] = {}
    for file in (tmp_path / "out").rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        if "train/loss" in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == pytest.approx(losses(tmp_path / "out"), rel=1e-6)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_recorded_command_of_a_resumed_run_starts_anew(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["train", str(recipe), "-o", str(out), "--method", "lora"]
    assert run(cli, words) == 0
    shutil.rmtree(out / "adapter")
    monkeypatch.setattr(sys, "argv", ["loraover", *words, "--resume"])
    assert run(cli, [*words, "--resume"]) == 0
    command = f"loraover {shlex.join(words)}"
    assert f"\n{command}\n" in (out / "adapter" / "README.md").read_text()


def test_compare_shows_runs_side_by_side(
    trained: dict[tuple[str, str], Trained], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    runs = [trained["llama", method] for method in METHODS]
    assert run(cli, ["compare", *(str(r.folder) for r in runs)]) == 0
    printed = capsys.readouterr().out
    rows = {line.strip().split("  ")[0]: line for line in printed.splitlines() if line.strip()}
    for one in runs:
        assert str(one.folder) in printed
        assert f"{one.result.added_parameters:,}" in rows["parameters added while training"]
        assert str(one.result.after) in rows["after"]
    assert rows["method"].split()[1:] == list(METHODS)
    assert run(cli, ["compare", "--json", *(str(r.folder) for r in runs)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {path: RunResult.model_validate(values) for path, values in printed.items()} == {
        str(r.folder): r.result for r in runs
    }


def test_compare_refuses_what_is_no_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, said in ((None, "run.json"), ({"schema_version": 99}, "schema_version")):
        if content is not None:
            (tmp_path / "run.json").write_text(json.dumps(content))
        assert run(cli, ["compare", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
