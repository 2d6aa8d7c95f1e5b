"""Requests to resume that are refused, and leave what is there as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import loraover
from loraover.common.file_lock import hold_lock, is_locked
from loraover.training.run.folder import LOCK_FILE

from support.lines import Acting
from support.make_checkpoint import tree
from support.resumed_run import interrupted_at
from support.train_command import data_file, train

pytestmark = pytest.mark.process


@pytest.fixture
def recipe(recipes: dict[str, Path]) -> Path:
    return recipes["llama"]


def test_another_recipe_does_not_resume_the_run(
    recipe: Path, halted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(halted["llama"], tmp_path / "out"))
    before = tree(out)
    assert train(recipe, out, "--resume", "--seed", 3, "--set", "over.decomposition=svd") == 2
    assert "another recipe (over, training differ)" in capsys.readouterr().err
    assert tree(out) == before


@pytest.mark.parametrize("kind", ["train", "test"])
def test_changed_data_do_not_resume_the_run(
    kind: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{number}+1?", "completion": f" {number + 1}"} for number in range(16)]
    train_data, test_data = (
        data_file(tmp_path / f"{name}.jsonl", *part) for name, part in (("train", rows[:8]), ("test", rows[8:]))
    )
    options = ("--data", train_data, "--test-data", test_data, "--set", "data.train_examples=null")
    with interrupted_at(3):
        assert train(recipe, tmp_path / "out", *options) == 130
    before = tree(tmp_path / "out")
    data_file(tmp_path / f"{kind}.jsonl", *{"train": rows[1:8], "test": rows[9:]}[kind])
    assert train(recipe, tmp_path / "out", *options, "--resume") == 2
    named = {"train": "other training rows", "test": "other held-out rows"}[kind]
    assert named in (error := capsys.readouterr().err)
    assert f"file {kind}.jsonl" in error
    assert tree(tmp_path / "out") == before


def test_a_finished_run_is_not_resumed(
    recipe: Path, whole: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = whole["llama"]
    before = tree(out)
    assert train(recipe, out, "--resume") == 2
    assert "finished already" in capsys.readouterr().err
    assert tree(out) == before


def test_a_run_that_another_process_trains_is_not_resumed(
    recipe: Path, halted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(halted["llama"], tmp_path / "out"))
    before = tree(out)
    with hold_lock(out / LOCK_FILE, wait=False):  # a second opening of a file conflicts within one process, too
        assert train(recipe, out, "--resume") == 2
    assert "is being trained by another process" in capsys.readouterr().err
    assert tree(out) == before


def test_a_run_is_locked_while_it_is_trained(recipe: Path, tmp_path: Path) -> None:
    out, held = tmp_path / "out", list[bool]()
    loraover.train(recipe, out, report=Acting("training steps", lambda: held.append(is_locked(out / LOCK_FILE))))
    assert held == [True]
    assert not is_locked(out / LOCK_FILE)


@pytest.mark.parametrize("file", [None, "out", "out/mine"])
def test_what_is_no_run_is_not_resumed(
    file: str | None, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if file is not None:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("mine")
    before = tree(tmp_path)
    assert train(recipe, tmp_path / "out", "--resume") == 2
    assert "holds no run to resume" in capsys.readouterr().err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", ["", "a: [", "distributed: 2", "distributed: {processes: two}"])
def test_a_run_whose_recipe_is_damaged_is_not_resumed(
    content: str, recipe: Path, halted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(halted["llama"], tmp_path / "out"))
    (out / "recipe.yaml").write_text(content)
    assert train(recipe, out, "--resume") == 2
    assert str(out / "recipe.yaml") in capsys.readouterr().err


def test_an_interrupted_run_is_not_started_over_by_mistake(
    recipe: Path, halted: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = halted["llama"]
    before = tree(out)
    assert train(recipe, out) == 2
    assert "exists already" in capsys.readouterr().err
    assert tree(out) == before
