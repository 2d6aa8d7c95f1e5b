"""What `loraover train` learns from: completions alone, from the same start by each method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraover.data.word_problems import split_word_problems

from support.tiny_hub import EOS, write_recipe
from support.train_command import TURNS, data_file, train
from support.trained_run import MODELS, Trained, losses, watched

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_network")]


def text_of(tokenizer: Any, ids: Tensor) -> str:
    text: str = tokenizer.decode(ids[ids != tokenizer.pad_token_id])
    return text


def examples_in_batch(trainer: Any) -> list[tuple[str, str, str]]:
    """Text of the input, of what carries a label, and of what carries none, of each example of the first batch."""
    tokenizer = trainer.processing_class
    found = []
    for batch in [next(iter(trainer.get_train_dataloader())), next(iter(trainer.get_eval_dataloader()))]:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            learnt = labels != -100
            rest = ids
            if len(ids) == len(labels) and torch.equal(ids[learnt], labels[learnt]):
                rest = ids[~learnt]
            found.append((text_of(tokenizer, ids), tokenizer.decode(labels[learnt]), text_of(tokenizer, rest)))
    return found


@pytest.mark.parametrize(("kind", "method"), [("llama", "lora"), ("llama", "lora-over"), ("t5", "lora-over")])
def test_only_the_completion_is_learnt(kind: str, method: str, trained: dict[tuple[str, str], Trained]) -> None:
    """An encoder-decoder reads the prompt, and a causal model the completion too."""
    rows, held_out = split_word_problems(20, 4, 0)
    completions = {row["prompt"].lower(): row["completion"].lower() for row in rows + held_out}
    found = examples_in_batch(trained[kind, method].trainer)
    assert len(found) == 8
    for whole, learnt, _ in found:
        prompt = whole.removesuffix(EOS) if kind == "t5" else whole.removesuffix(learnt)
        assert learnt == completions[prompt] + EOS


def test_chat_turns_are_learnt_one_by_one(bases: dict[str, Path], tmp_path: Path) -> None:
    file = data_file(tmp_path / "chat.jsonl", *[{"messages": TURNS}] * 4)
    other = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "3"}]
    test = data_file(tmp_path / "test.jsonl", {"messages": TURNS}, {"messages": other})
    data = {"train": str(file), "test": str(test)}
    recipe = write_recipe(tmp_path / "recipe.yaml", bases["chat"], data=data, training={"max_steps": 1})
    with watched() as seen:
        assert train(recipe, tmp_path / "out") == 0
    found = {(learnt, rest) for _, learnt, rest in examples_in_batch(seen[0][0])}
    assert found == {
        (f"2{EOS}", "<user>1+1?<assistant>"),
        (f"#### 4{EOS}", f"<user>1+1?<assistant>2{EOS}<user>and 2+2?<assistant>"),
        (f"3{EOS}", "<user>1+1?<assistant>"),
    }


@pytest.mark.parametrize(("chat", "prompt"), [(None, "<user>1+1?<assistant>"), (False, "1+1?")])
def test_text_goes_through_the_chat_template_unless_told_otherwise(
    chat: bool | None, prompt: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    file = data_file(tmp_path / "text.jsonl", *[{"prompt": "1+1?", "completion": "2"}] * 4)
    test = data_file(tmp_path / "test.jsonl", *[{"prompt": "1+1?", "completion": answer} for answer in "23"])
    data = {"train": str(file), "test": str(test), "chat": chat}
    recipe = write_recipe(tmp_path / "recipe.yaml", bases["chat"], data=data, training={"max_steps": 1})
    with watched() as seen:
        assert train(recipe, tmp_path / "out") == 0
    assert {(learnt, rest) for _, learnt, rest in examples_in_batch(seen[0][0])} == {
        (f"2{EOS}", prompt),
        (f"3{EOS}", prompt),
    }


@pytest.mark.parametrize("kind", MODELS)
def test_both_methods_start_from_the_same_adapter(kind: str, trained: dict[tuple[str, str], Trained]) -> None:
    plain, cores = trained[kind, "lora"], trained[kind, "lora-over"]
    assert plain.start.keys() == cores.start.keys()
    assert all(torch.equal(plain.start[name], cores.start[name]) for name in plain.start)
    assert all(matrix.any() == ("lora_A" in name) for name, matrix in plain.start.items())
    assert plain.result.before == cores.result.before
    assert losses(cores.folder)[1] == pytest.approx(losses(plain.folder)[1], rel=1e-5)
    assert losses(cores.folder)[4] != losses(plain.folder)[4]


def test_another_seed_starts_from_another_adapter(trained: dict[tuple[str, str], Trained], tmp_path: Path) -> None:
    first = trained["llama", "lora"]
    with watched() as seen:
        assert train(first.folder / "recipe.yaml", tmp_path / "out", "--seed", 1, "--steps", 1) == 0
    name = next(name for name in first.start if "lora_A" in name)
    assert not torch.equal(seen[0][1][name], first.start[name])
