"""The seal of a trainer's checkpoint covers every file, and rotation counts what is sealed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from loraover.callbacks.seal_checkpoints import SealCheckpoints, last_whole_checkpoint, remove_incomplete, seal
from loraover.checkpoint.checkpoint import SEAL_FILE
from loraover.common.errors import CheckpointError

from support.children import Child, become_nobody


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
