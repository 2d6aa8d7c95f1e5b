"""Training examples that are cut, or that have nothing to learn, are counted and said; open values are chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import loraover
import loraover.training.defaults
from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import ConfigError, DataError
from loraover.data.sources import Rows
from loraover.models.load import load_model, load_tokenizer, resolve_model
from loraover.training.defaults import LEARNING_RATES
from loraover.training.lengths import Tokens, count_tokens, summarise
from loraover.training.plan import make_plan
from loraover.training.recipe import load_recipe
from loraover.training.run_result import read_run

from support.lines import Lines
from support.tiny_hub import write_recipe
from support.train_command import TURNS, data_file, train

pytestmark = pytest.mark.process


CUT: dict[str, Any] = {"evaluation": {"examples": 0}, "training": {"max_length": 16}}


@pytest.mark.parametrize("kind", ["llama", "chat"])
def test_tokens_are_those_that_trl_trains_on(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    source = resolve_model(str(bases[kind]))
    tokenizer = load_tokenizer(source)
    texts: list[dict[str, Any]] = [{"prompt": "1+1?", "completion": " 2" * n} for n in (1, 5)]
    chats: list[dict[str, Any]] = [{"prompt": TURNS[:n], "completion": TURNS[n : n + 1]} for n in (1, 3)]
    rows = chats if kind == "chat" else texts
    config = SFTConfig(str(tmp_path), max_length=None, bf16=False, use_cpu=True, report_to="none")
    made = SFTTrainer(load_model(source), config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    labelled = [sum(label != -100 for label in row["labels"]) for row in made.train_dataset]
    found = count_tokens(Rows(rows, ""), "sft", tokenizer)
    assert [one.total for one in found] == [len(row["input_ids"]) for row in made.train_dataset]
    assert [one.total - one.prompt for one in found] == labelled


def test_input_and_target_of_an_encoder_decoder_are_cut_apart(bases: dict[str, Path]) -> None:
    rows = [{"prompt": "1+1?", "completion": "2" * 9}, {"prompt": "1" * 20, "completion": "2"}]
    found = count_tokens(Rows(rows, ""), "seq2seq", load_tokenizer(resolve_model(str(bases["t5"]))))
    assert found == [Tokens(0, 10), Tokens(0, 21)]


def test_what_is_cut_is_counted() -> None:
    tokens = [Tokens(4, 10)] * 197 + [Tokens(20, 30), Tokens(4, 40), Tokens(4, 17)]
    found = summarise(tokens, Rows([{}] * 200, "", numbers=range(11, 211)), 16)
    assert (found.cut, found.unlabelled, found.longest, found.keeps_99) == (3, 1, 40, 17)
    assert found.cut_rows == [208, 209, 210]
    assert found.histogram == {16: 197, 32: 2, 64: 1}


def test_cut_examples_are_said_with_their_lines_and_kept(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "1+1?", "completion": " 2" * (20 if n in (3, 5) else 1)} for n in range(40)]
    rows[7] = {"prompt": "1" * 30, "completion": " 2"}
    file = data_file(tmp_path / "rows.jsonl", *rows)
    changes = {"data": {"train": str(file), "train_examples": None}, **CUT}
    recipe = write_recipe(tmp_path / "r.yaml", base, method="lora", **changes)
    assert train(recipe, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert (
        "warning: 3 of 40 examples are longer than training.max_length = 16, so their ends are cut (rows 4, 6, 8)"
        in said
    )
    assert "1 of 40 examples have no room for their completion within training.max_length = 16 and are left out" in said
    kept = read_run(tmp_path / "out").lengths
    assert kept is not None
    assert (kept.cut, kept.unlabelled, kept.cut_rows) == (3, 1, [4, 6, 8])
    assert run(cli, ["train", str(recipe), "--plan"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "up to 8 tokens ######################## 37" in shown
    assert "3 of 40 (7.5%) at max_length 16; 1 of them have nothing to learn" in shown


def test_data_whose_labels_are_all_cut_are_refused(base: Path, tmp_path: Path) -> None:
    file = data_file(tmp_path / "rows.jsonl", *[{"prompt": "1" * 30, "completion": " 2"}] * 4)
    changes = {"data": {"train": str(file), "train_examples": None}, **CUT}
    recipe = write_recipe(tmp_path / "r.yaml", base, **changes)
    with pytest.raises(DataError, match=r"no example fits training.max_length = 16.*33 tokens"):
        loraover.train(str(recipe), tmp_path / "out")


def test_data_and_a_model_are_enough(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"{n}+1?", "completion": f" {n + 1}"} for n in range(40)]
    file = data_file(tmp_path / "rows.jsonl", *rows)
    monkeypatch.chdir(tmp_path)
    assert run(cli, ["train", "--data", str(file), "--model", str(base)]) == 0
    made = load_recipe(str(tmp_path / "runs" / "rows-1" / "recipe.yaml"))
    found = read_run(tmp_path / "runs" / "rows-1")
    assert found.lengths is not None
    assert (found.steps, found.lengths.cut) == (5, 0)
    assert made.training.learning_rate == found.learning_rate == pytest.approx(LEARNING_RATES["lora-over"] * 576 / 32)
    assert (made.training.micro_batch, made.training.max_length) == (8, found.lengths.longest)
    assert (made.training.warmup_steps, made.training.bf16) == (0.03, False)
    assert found.before is not None
    assert (found.before.examples, found.before.exact_match) == (2, None)


def test_without_a_recipe_model_and_data_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["train", "--data", "rows.jsonl"]) == 2
    assert "model: required and missing" in capsys.readouterr().err


@pytest.mark.parametrize(("gigabytes", "batch", "checkpointing"), [(1, 8, False), (0.002, 2, False), (0.0007, 1, True)])
def test_auto_takes_the_largest_batch_that_fits(
    gigabytes: float, batch: int, checkpointing: bool, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loraover.training.defaults, "total_memory", lambda _: int(gigabytes * 1e9))
    said = Lines()
    found = make_plan(load_recipe(str(recipe), {"training.per_device_train_batch_size": "auto"}), said)
    assert found.lengths is not None
    assert (found.lengths.examples, found.lengths.cut) == (20, 0)
    (line,) = [line for line in said.lines if "per_device_train_batch_size" in line]
    assert f"per_device_train_batch_size: {batch}, which" in line
    assert f"gradient_accumulation_steps: {8 // batch}" in line
    assert ("gradient_checkpointing" in line) is checkpointing


def test_auto_on_a_machine_that_is_too_small_is_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loraover.training.defaults, "total_memory", lambda _: 10_000)
    with pytest.raises(ConfigError, match="not even one example of 128 tokens fits"):
        make_plan(load_recipe(str(recipe), {"training.per_device_train_batch_size": "auto"}))
