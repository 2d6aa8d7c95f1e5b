"""A run that was stopped goes on as if it never had, or is refused and stays as it was."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import loraover
import loraover.callbacks.seal_checkpoints
from loraover.callbacks.seal_checkpoints import last_whole_checkpoint
from loraover.checkpoint.checkpoint import SEAL_FILE
from loraover.common.errors import ConfigError
from loraover.common.file_lock import hold_lock, is_locked
from loraover.training.recipe import load_recipe
from loraover.training.run.folder import LOCK_FILE, with_commits, write_recipe

from support.children import Child
from support.data_hub import DataHub
from support.lines import Acting
from support.make_checkpoint import tree
from support.resumed_run import KINDS, STOP, assert_same_run, interrupted_at, losses, steps_taken, stopped
from support.train_command import data_file, train
from support.trained_run import metrics

pytestmark = pytest.mark.process


@pytest.fixture
def recipe(recipes: dict[str, Path]) -> Path:
    return recipes["llama"]


# Whole runs


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_one_that_was_never_interrupted(
    kind: str,
    recipes: dict[str, Path],
    whole: dict[str, Path],
    halted: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = Path(shutil.copytree(halted[kind], tmp_path / "out"))
    capsys.readouterr()
    with steps_taken() as taken:
        assert train(recipes[kind], out, "--resume") == 0
    assert taken == [5, 6, 7]
    assert f"{out}: resumed after step 4 of 7" in "".join(capsys.readouterr())
    assert_same_run(out, whole[kind])
    assert losses(whole[kind])[1] != losses(whole[kind])[2]


def test_a_killed_run_is_resumed_while_its_loaders_of_data_still_live(
    recipe: Path, whole: dict[str, Path], tmp_path: Path
) -> None:
    """PyTorch's workers look every 5 seconds whether their parent lives."""
    workers = yaml.safe_load(recipe.read_text())
    workers["training"]["dataloader_num_workers"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(workers))
    command, out = tmp_path / "recipe.yaml", tmp_path / "out"
    with interrupted_at(STOP, signal.SIGKILL):
        child = Child(lambda: train(command, out))
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert train(command, out, "--resume", "auto") == 0
    assert child.end().code == -signal.SIGKILL
    assert_same_run(out, whole["llama"])


def test_a_run_interrupted_before_its_first_checkpoint_starts_again(
    recipe: Path, whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = stopped(recipe, tmp_path / "out", step=2)
    assert last_whole_checkpoint(out / "trainer") is None
    assert train(recipe, out, "--resume") == 0
    assert f"{out}: no complete checkpoint yet, so begun again at step 0 of 7" in "".join(capsys.readouterr())
    assert_same_run(out, whole["llama"])


def test_a_run_interrupted_after_its_last_step_takes_no_more(recipe: Path, tmp_path: Path) -> None:
    """Its rate does not end at zero, so that a step too many shows."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    constant = ("--set", "training.lr_scheduler_type=constant_with_warmup")
    assert train(recipe, tmp_path / "whole", *constant) == 0
    out, rate = tmp_path / "out", {"training.lr_scheduler_type": "constant_with_warmup"}
    with pytest.raises(KeyboardInterrupt):
        loraover.train(recipe, out, overrides=rate, report=Acting("measuring the held-out loss after", interrupt))
    with steps_taken() as taken:
        assert train(recipe, out, *constant, "--resume") == 0
    assert taken == []
    assert_same_run(out, tmp_path / "whole")


def test_a_run_that_was_killed_before_its_result_logs_its_measures_once(
    recipe: Path, whole: dict[str, Path], tmp_path: Path
) -> None:
    kept = whole["llama"]
    out = Path(shutil.copytree(kept, tmp_path / "out", ignore=shutil.ignore_patterns("run.json", "adapter")))
    assert train(recipe, out, "--resume") == 0
    assert metrics(out) == metrics(kept)


def test_metrics_that_were_cut_off_are_mended_and_tell_each_thing_once(
    recipe: Path, whole: dict[str, Path], halted: dict[str, Path], tmp_path: Path
) -> None:
    kind = "llama"
    out = Path(shutil.copytree(halted[kind], tmp_path / "out"))
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(b"".join(lines[:-1]) + b'{"step": 5, "lo\xff')
    assert train(recipe, out, "--resume") == 0
    told = [[(row["step"], row.get("loss"), row.get("eval_loss")) for row in metrics(f)] for f in (out, whole[kind])]
    assert told[0] == told[1]


# Half-written checkpoints


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "an empty seal": (SEAL_FILE, lambda _: b""),
    "a truncated seal": (SEAL_FILE, lambda content: content[:-1]),
    "a seal of something else": (SEAL_FILE, lambda _: b'{"files": {"gone": "00"}}'),
    "an optimizer of other bits": ("optimizer.pt", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    name: str, damage: Callable[[bytes], bytes], halted: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(halted["llama"] / "trainer", tmp_path / "trainer"))
    for step, before in ((4, folder / "checkpoint-2"), (2, None)):
        path = folder / f"checkpoint-{step}" / name
        path.write_bytes(damage(path.read_bytes()))
        assert last_whole_checkpoint(folder) == before


def test_a_run_is_continued_at_its_commits_when_the_hub_has_newer_ones(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"{number}+1?", "completion": f" {number + 1}"} for number in range(20)]
    hub = DataHub(monkeypatch, owner__data={"train": rows[:10], "test": rows[10:]})
    first = hub.commit("owner/data")
    options = ("--data", "owner/data", "--steps", "3")
    with interrupted_at(3):
        assert train(recipe, tmp_path / "out", *options) == 130
    hub.version += 1
    assert train(recipe, tmp_path / "out", *options, "--resume") == 0
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["data"]["revision"] == first


@pytest.mark.parametrize("train", ["owner/data", ["a.jsonl", {"path": "b.jsonl", "weight": 2}]])
def test_commits_are_those_of_the_same_model_and_data(train: Any, tmp_path: Path) -> None:
    asked = load_recipe("demo", {"data.train": train, "data.test": "owner/held-out"})
    begun = load_recipe(asked, {"model_revision": "m", "data.revision": "d", "distributed.processes": 2})
    write_recipe(tmp_path, begun)
    assert with_commits(asked, tmp_path) == begun
    named = load_recipe(asked, {"model_revision": "other", "data.revision": "other"})
    assert with_commits(named, tmp_path) == named.changed("distributed", processes=2)
    others = load_recipe(asked, {"model": "owner/other", "data.test": "owner/other"})
    assert with_commits(others, tmp_path) == others.changed("distributed", processes=2)


def test_a_run_goes_on_with_what_another_machine_has_chosen(tmp_path: Path) -> None:
    chosen = {"training.bf16": True, "training.learning_rate": 2e-3, "training.max_length": 77}
    batch = "training.per_device_train_batch_size"
    of_batch = {batch: 2, "training.gradient_accumulation_steps": 4, "training.gradient_checkpointing": True}
    begun = load_recipe("demo", chosen | of_batch)
    write_recipe(tmp_path, begun)
    asked = load_recipe("demo", dict.fromkeys(chosen) | {batch: "auto"})
    assert with_commits(asked, tmp_path) == begun.changed("distributed", processes=1)
    named = load_recipe("demo", chosen | of_batch | {"training.learning_rate": 1e-3})
    assert with_commits(named, tmp_path).training.learning_rate == 1e-3
    other = load_recipe("demo", dict.fromkeys(chosen) | {"training.fp16": True})
    with pytest.raises(ConfigError, match=r"the run was started with another recipe \(distributed, training differ\)"):
        write_recipe(tmp_path, with_commits(other, tmp_path))


def test_the_recipe_of_a_run_is_there_from_its_first_step(halted: dict[str, Path]) -> None:
    for out in halted.values():
        assert yaml.safe_load((out / "recipe.yaml").read_text())["method"] == "lora-over"
        assert not (out / "adapter").exists()
        assert not (out / "run.json").exists()


@pytest.mark.parametrize(
    ("runs", "options", "said"),
    [
        ("whole", ("--resume",), "finished already"),
        ("halted", (), "exists already"),
        (
            "halted",
            ("--resume", "--seed", 3, "--set", "over.decomposition=svd"),
            "another recipe (over, training differ)",
        ),
    ],
    ids=["finished", "interrupted", "another recipe"],
)
def test_a_run_is_not_started_over_or_resumed_by_mistake(
    runs: str,
    options: tuple[Any, ...],
    said: str,
    recipe: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = request.getfixturevalue(runs)["llama"]
    before = tree(out)
    assert train(recipe, out, *options) == 2
    assert said in capsys.readouterr().err
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
