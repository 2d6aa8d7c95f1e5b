"""Seals, digests and checks of the files of checkpoints and adapters."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from threading import Event

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from loraover.callbacks.seal_checkpoints import SealCheckpoints, last_whole_checkpoint, remove_incomplete, seal
from loraover.checkpoint.base_model import model_digest
from loraover.checkpoint.checkpoint import SEAL_FILE
from loraover.checkpoint.tensor_file import HASHED_AT_ONCE, is_finite, sha256_of
from loraover.common.errors import CheckpointError, ConfigError
from loraover.models.load import ModelSource, resolve_model

from support.children import Child, become_nobody
from support.tiny_hub import save_llama


def checkpoint(folder: Path, step: int, **files: str) -> Path:
    made = folder / f"checkpoint-{step}"
    (made / "inner").mkdir(parents=True)
    (made / "a.bin").write_text(files.get("a", "one"))
    (made / "inner" / "b.bin").write_text(files.get("b", "two"))
    return made


def test_a_seal_covers_every_file(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, 1)
    seal(made)
    assert set(json.loads((made / SEAL_FILE).read_text())["files"]) == {"a.bin", "inner/b.bin"}
    before = (made / SEAL_FILE).read_bytes()
    seal(made)
    assert (made / SEAL_FILE).read_bytes() == before
    for name in ("a.bin", "inner/b.bin"):
        kept = (made / name).read_bytes()
        (made / name).write_text("changed")
        assert last_whole_checkpoint(tmp_path) is None
        (made / name).write_bytes(kept)
        assert last_whole_checkpoint(tmp_path) == made


def test_the_latest_checkpoint_is_the_one_with_the_highest_step(tmp_path: Path) -> None:
    for step in (2, 10, 9, 100):
        seal(checkpoint(tmp_path, step))
    checkpoint(tmp_path, 1000)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    (tmp_path / "checkpoint-100" / "a.bin").unlink()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize(
    ("limit", "whole", "half", "best", "left"),
    [
        (1, [4], [6], None, [5, 6]),
        (2, [2, 4], [6], None, [4, 5, 6]),
        (2, [2], [3, 4], None, [2, 3, 4, 5]),
        (1, [2, 4], [], 2, [2, 5]),
        (1, [4, 8], [6], None, [5, 6, 8]),
        (None, [2, 4], [6], None, [2, 4, 5, 6]),
        (0, [2, 4], [6], None, [2, 4, 5, 6]),
        (-1, [2, 4], [6], None, [2, 4, 5, 6]),
    ],
)
def test_rotation_counts_what_is_sealed_and_takes_nothing_else(
    limit: int | None, whole: list[int], half: list[int], best: int | None, left: list[int], tmp_path: Path
) -> None:
    """Of a run that was killed while it wrote a checkpoint, resumed, and has saved step 5."""
    for step in [*whole, *half, 5]:
        checkpoint(tmp_path, step)
    for step in whole:
        seal(tmp_path / f"checkpoint-{step}")
    args = TrainingArguments(str(tmp_path), save_total_limit=limit, use_cpu=True)
    state = TrainerState(global_step=5, best_model_checkpoint=best and str(tmp_path / f"checkpoint-{best}"))
    callback, control = SealCheckpoints(), TrainerControl()
    callback.on_train_begin(args, state, control)
    callback.on_save(args, state, control)
    assert sorted(int(p.name.removeprefix("checkpoint-")) for p in tmp_path.iterdir()) == left


@pytest.mark.parametrize("name", ["a.bin", SEAL_FILE])
def test_a_file_that_may_not_be_read_does_not_make_a_checkpoint_incomplete(name: str, public: Path) -> None:
    """Else a resumed run would begin earlier, and remove it."""
    for step in (2, 4):
        seal(checkpoint(public, step))
    (public / "checkpoint-4" / name).chmod(0)

    def refused() -> int:
        expected = rf"checkpoint-4/{name}: cannot be read: Permission denied, .*readable"
        with pytest.raises(CheckpointError, match=expected):
            last_whole_checkpoint(public)
        return 0

    assert (ended := Child(refused, prepare=become_nobody).end()).code == 0, ended.output


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path / "nothing") is None
    assert last_whole_checkpoint(tmp_path) is None
    for name in ("checkpoint-", "checkpoint-last", "checkpoint-5-old", "checkpoint-²", "tmp-checkpoint-7"):
        shutil.copytree(checkpoint(tmp_path / "made", 1), tmp_path / name)
        seal(tmp_path / name)
        shutil.rmtree(tmp_path / "made")
    (tmp_path / "checkpoint-9").write_text("a file")
    remove_incomplete(tmp_path, 0)
    assert (tmp_path / "checkpoint-9").is_file()
    assert last_whole_checkpoint(tmp_path) is None


FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja")


@pytest.mark.parametrize("name", [*FILES, "model.safetensors"])
def test_every_file_that_changes_answers_changes_the_digest(name: str, tmp_path: Path) -> None:
    source = resolve_model(str(save_llama(tmp_path / "base")))
    before = [model_digest(source, weights=weights) for weights in (True, False)]
    assert before == [model_digest(source, weights=weights) for weights in (True, False)]
    with (tmp_path / "base" / name).open("ab") as file:
        file.write(b" ")
    after = [model_digest(source, weights=weights) for weights in (True, False)]
    assert after[0] != before[0]
    assert (after[1] == before[1]) == (name == "model.safetensors")


def test_a_model_card_does_not_change_the_digest(tmp_path: Path) -> None:
    source = resolve_model(str(save_llama(tmp_path / "base")))
    before = model_digest(source, weights=True)
    (tmp_path / "base" / "README.md").write_text("# base")
    assert model_digest(source, weights=True) == before


def test_a_model_on_the_hub_is_recognised_by_its_commit() -> None:
    source = ModelSource("owner/model", "owner/model", "a" * 40, "hub owner/model@aaaaaaaaaaaa")
    assert model_digest(source, weights=True) == "a" * 40


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        model_digest(ModelSource("x", str(tmp_path / "gone"), None, "folder x"), weights=True)


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("place", [0, 77, 999])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found(dtype: torch.dtype, place: int, value: float) -> None:
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(numbers)
    numbers[place] = value
    assert not is_finite(numbers)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_two_infinities_do_not_cancel(dtype: torch.dtype) -> None:
    assert not is_finite(torch.tensor([1.0, float("inf"), -float("inf")], dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_numbers_are_finite_even_if_their_sum_is_not(dtype: torch.dtype) -> None:
    assert is_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))


def test_integers_and_no_numbers_are_finite() -> None:
    assert is_finite(torch.arange(3))
    assert is_finite(torch.tensor([True]))
    assert is_finite(torch.empty(0))


def test_hashing_stops_when_it_should(tmp_path: Path) -> None:
    content = bytes(3 * HASHED_AT_ONCE + 1)
    (tmp_path / "file").write_bytes(content)
    ending = Event()
    assert sha256_of(tmp_path / "file", ending) == sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    ending.set()
    assert sha256_of(tmp_path / "file", ending) != sha256_of(tmp_path / "file")
