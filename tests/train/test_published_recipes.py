"""Recipes after LoRA-GA's protocol, run whole on tiny models of the same kind and slices in the hub's columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from loraover import read_checkpoint
from loraover.cli import cli
from loraover.common.command_line import run
from loraover.training.recipe import load_recipe
from loraover.training.run_result import read_run

from support.published import LLAMA_2, LLAMA_3_1, SLICES, TEXT
from support.tiny_hub import save_llama, save_t5
from support.train_command import data_file
from support.trained_run import matrices, metrics

pytestmark = pytest.mark.process

SIZES = {"mnli": 392_702, "sst2": 67_349, "cola": 8_551, "qnli": 104_743, "mrpc": 3_668}
EXAMPLES = 40
STEPS = 2
"""40 examples in batches of 32: the second step is smaller."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "t5": save_t5(folder / "t5"),
        "llama": save_llama(folder / "llama", **LLAMA_2),
        "llama 3.1": save_llama(folder / "llama31", **LLAMA_3_1),
    }


def kind(recipe: str) -> str:
    return "t5" if "t5" in recipe else "llama"


def train(recipe: str, bases: dict[str, Path], folder: Path, *options: object, base: str | None = None) -> int:
    """Train the recipe in `folder`/run on the tiny model, and on files in place of the splits of its data."""
    held_out = {key: f"{value} today" if value == TEXT else value for key, value in SLICES[recipe].items()}
    for name, count, row in (("train", EXAMPLES, SLICES[recipe]), ("test", 4, held_out)):
        rows = [row | {"idx": i} for i in range(count)]
        data_file(folder / f"{name}.jsonl", *rows)
    local = [
        "--model",
        bases[base or kind(recipe)],
        "--data",
        folder / "train.jsonl",
        "--test-data",
        folder / "test.jsonl",
        *("--set", "data.train_split=train", "--set", "data.test_split=test"),
    ]
    return run(cli, ["train", recipe, "-o", str(folder / "run"), *map(str, [*local, *options])])


@pytest.mark.parametrize(
    ("recipe", "base"),
    [("glue-mnli-t5-base", "t5"), ("metamath-gsm8k", "llama 3.1"), ("codefeedback-humaneval", "llama")],
)
def test_a_published_recipe_runs_from_end_to_end(
    recipe: str, base: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """One of GLUE's: the others differ in their data alone."""
    assert train(recipe, bases, tmp_path, base=base) == 0
    result = read_run(tmp_path / "run")
    assert (result.steps, result.method) == (STEPS, "lora-over")
    assert result.after is not None
    assert (result.after.exact_match is not None) is (kind(recipe) == "t5")
    found = matrices(tmp_path / "run")
    sites = read_checkpoint(tmp_path / "run" / "adapter").meta.sites
    assert len(found) == len(sites) == 2 * len(list(linear_layers(bases[base], kind(recipe))))
    assert all(matrix.any() for matrix in found.values())


def linear_layers(base: Path, kind: str) -> Iterator[str]:
    """The linear layers of a model but for its head."""
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(base)
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear" and module is not model.get_output_embeddings():
            yield name


@pytest.mark.parametrize("recipe", SLICES)
def test_a_published_recipe_is_the_protocol(recipe: str) -> None:
    loaded = load_recipe(recipe)
    training = loaded.training
    assert (loaded.lora.r, loaded.lora.lora_alpha, loaded.lora.target_modules) == (8, 16, "all-linear")
    assert loaded.lora.init_lora_weights is True
    assert (training.num_train_epochs, training.max_steps) == (1, None)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 32
    assert (training.lr_scheduler_type, training.warmup_steps, training.weight_decay) == ("cosine", 0.03, 0)
    assert training.optim.startswith("adamw")
    found = (training.bf16, training.learning_rate, training.max_length)
    assert found == ((False, 1e-4, 128) if kind(recipe) == "t5" else (True, 2e-5, 1024))
    assert "arXiv:2407.05000" in loaded.description
    examples = loaded.data.train_examples or SIZES[str(loaded.data.subset)]
    assert training.save_steps < training.steps(examples)


def test_recipes_of_glue_differ_in_their_data_alone() -> None:
    def common(task: str) -> dict[str, Any]:
        values = load_recipe(f"glue-{task}-t5-base").model_dump(exclude={"description", "data"})
        del values["training"]["save_steps"], values["training"]["logging_steps"], values["evaluation"]["examples"]
        return values

    for task in SIZES:
        assert common(task) == common("qnli")
        data = load_recipe(f"glue-{task}-t5-base").data
        assert (data.subset, data.format) == (task, f"glue-{task}")


def test_the_rate_rises_for_a_share_of_the_steps_and_falls_to_zero(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = "glue-cola-t5-base"
    small = ["--set", "training.per_device_train_batch_size=1", "--set", "training.gradient_accumulation_steps=1"]
    shown = ["--set", "training.logging_steps=1", "--set", "training.warmup_steps=0.1"]
    assert train(recipe, bases, tmp_path, *small, *shown, "--method", "lora", "--set", "evaluation.examples=0") == 0
    rates = [row["learning_rate"] for row in metrics(tmp_path / "run") if "loss" in row]
    peak = load_recipe(recipe).training.peak_rate
    assert len(rates) == EXAMPLES
    assert rates[:5] == pytest.approx([0, peak / 4, peak / 2, peak * 3 / 4, peak])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < peak / 100


def test_a_run_that_was_stopped_after_its_last_step_is_finished(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eigen = ["over.decomposition=eigen", "over.options={}", "training.optim=adafactor"]
    options = [part for key in eigen for part in ("--set", key)]

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("loraover.training.run.train.publish_directory", interrupt)
        assert train("glue-qnli-t5-base", bases, tmp_path, *options) == 130
    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "train", lambda *_, **__: pytest.fail("took another step"))
        assert train("glue-qnli-t5-base", bases, tmp_path, *options, "--resume") == 0
    assert read_run(tmp_path / "run").steps == STEPS
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_an_example_without_room_for_its_completion_takes_no_part_in_the_epoch(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    long = ["--set", "training.max_length=120", "--set", "training.per_device_train_batch_size=1"]
    rows = [SLICES["metamath-gsm8k"]] * 33 + [SLICES["metamath-gsm8k"] | {"query": "x" * 200}] * 40
    data_file(tmp_path / "long.jsonl", *rows)
    options = [*long, "--set", f"data.train={tmp_path / 'long.jsonl'}", "--set", "training.save_steps=1"]
    assert train("metamath-gsm8k", bases, tmp_path, *options) == 0
    assert read_run(tmp_path / "run").steps == 5
