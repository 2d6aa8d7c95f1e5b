"""What `loraover train` refuses, code that it never runs, and a result that it does not publish."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraover.data.sources import Counted
from loraover.training.run_result import read_run

from support.children import Child
from support.tiny_hub import save_llama, write_recipe
from support.tiny_models import tiny_llama
from support.train_command import data_file, train

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_network")]

MARK = "was-here"
CODE = f"""
import pathlib
pathlib.Path(__file__).parents[0].joinpath("{MARK}").touch()
pathlib.Path({{folder!r}}).joinpath("{MARK}").touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
EVIL = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}


@pytest.mark.parametrize("where", ["config", "config of a known model", "tokenizer"])
def test_code_in_a_model_folder_is_never_run(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody is asked whether to run it; a script would answer yes."""

    def answer_yes() -> None:
        ours, theirs = os.pipe()
        os.write(theirs, b"y\n" * 9)
        sys.stdin = os.fdopen(ours)

    base = save_llama(tmp_path / "base")
    (base / "evil.py").write_text(CODE.format(folder=str(tmp_path)))
    file = base / ("tokenizer_config.json" if where == "tokenizer" else "config.json")
    values = json.loads(file.read_text())
    if where == "tokenizer":
        values |= {"auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}, "tokenizer_class": "EvilTokenizer"}
    else:
        values |= {"auto_map": EVIL} | ({"model_type": "evil"} if where == "config" else {})
    file.write_text(json.dumps(values))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    recipe = write_recipe(tmp_path / "recipe.yaml", base, training={"max_steps": 1})
    ended = Child(lambda: train(recipe, tmp_path / "out"), prepare=answer_yes).end()
    assert not list(tmp_path.rglob(MARK)), "the code was run"
    assert "[y/N]" not in ended.output, "a command asks no questions"
    assert ended.code in ((2,) if where == "config" else (0, 2))


def test_a_model_in_pickles_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Although it is whole, and PyTorch would read it."""
    base = save_llama(tmp_path / "base")
    torch.save(tiny_llama().state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    assert train(write_recipe(tmp_path / "recipe.yaml", base), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert str(base) in error
    assert "cannot be loaded" in error


def lacks(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


REFUSED: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "no such model": (lambda t: {"model": str(t / "nothing")}, "nothing"),
    "no weights": (lambda t: {"model": str(lacks(save_llama(t / "m"), "model.safetensors"))}, "cannot be loaded"),
    "no tokenizer": (
        lambda t: {"model": str(lacks(save_llama(t / "m"), "tokenizer.json", "tokenizer_config.json"))},
        "tokenizer",
    ),
    "chat without a template": (lambda t: {"data": {"chat": True}}, "chat template"),
    "a held-out prompt that fills the context": (
        lambda t: {
            "data": {"test": str(data_file(t / "rows.jsonl", {"prompt": "a" * 600, "completion": "42"}))},
            "evaluation": {"exact_match": True, "before": False},
        },
        "question 1: its 600 tokens leave no room",
    ),
    "a schedule that needs more": (
        lambda t: {"training": {"lr_scheduler_type": "cosine_with_min_lr"}},
        "cosine_with_min_lr|min_lr",
    ),
    "a shell's pattern for PEFT": (lambda t: {"lora": {"target_modules": "*.q_proj"}}, "not a regular expression"),
    "a huge pattern": (lambda t: {"lora": {"target_modules": "q_proj{99999999999}"}}, "not a regular expression"),
    "a wrong pattern of ranks": (lambda t: {"lora": {"rank_pattern": {"(": 4}}}, "not a regular expression"),
    "unknown target modules": (lambda t: {"lora": {"target_modules": ["nothing"]}}, "nothing"),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=list(REFUSED))
def test_an_unusable_request_ends_with_one_message_and_exit_code_2(
    change: Callable[[Path], dict[str, Any]],
    said: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = {"model": str(base)} | change(tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", values.pop("model"), **values)
    assert train(recipe, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert re.search("^error: ", error, re.MULTILINE)
    assert re.search(said, error)
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_listed_and_skipped(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion\n" + "1+1?,2\n" * 4 + "a,\n\x1b[2J,b,c\n")
    recipe = write_recipe(tmp_path / "recipe.yaml", base, data={"train": str(file)}, evaluation={"examples": 0})
    assert train(recipe, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"error: {file}: 2 rows cannot be learned. Correct them, or leave such rows out: --skip-bad-rows" in error
    assert [line.rpartition(" row ")[2][:2] for line in error.splitlines()[-2:]] == ["5:", "6:"]
    assert "\x1b" not in error
    assert train(recipe, tmp_path / "out", "--skip-bad-rows") == 0
    assert read_run(tmp_path / "out").skipped == Counted(2, [5, 6])
    assert "skip_bad_rows: true" in (tmp_path / "out" / "recipe.yaml").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU has both precisions")
def test_float16_on_a_cpu_is_refused_rather_than_ignored(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(recipe, tmp_path / "out", "--set", "training.fp16=true") == 2
    assert "needs an accelerator" in capsys.readouterr().err
