"""An interrupted run goes on as if nothing had happened, and only from a checkpoint that is whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

import loraover.callbacks.seal_checkpoints
import loraover.training.run
from loraover.callbacks.seal_checkpoints import SEAL_FILE, SealCheckpoints, last_whole_checkpoint, seal
from loraover.cli import cli
from loraover.common.command_line import INTERRUPTED, run
from loraover.training.failure import read_failure
from loraover.training.progress import TrainingProgress
from loraover.training.run_result import read_run

from support.tiny_hub import save_llama, save_t5, write_recipe
from support.versions import needs_order_of_batches

pytestmark = pytest.mark.process

STEPS = 7
STOP = 6
"""Checkpoints are written at 2, 4, 6 and 7, and 5 steps make an epoch: a run that stops in step 6 resumes from 4."""

KINDS = [("llama", "lora"), ("llama", "lora-over"), ("t5", "lora-over")]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """One recipe for each kind; dropout, decay and a schedule make a step depend on all that a checkpoint must hold."""
    folder = tmp_path_factory.mktemp("recipes")
    bases = {"llama": save_llama(folder / "llama"), "t5": save_t5(folder / "t5")}
    return {
        (kind, method): write_recipe(
            folder / f"{kind}-{method}.yaml",
            bases[kind],
            method=method,
            lora={"lora_dropout": 0.2},
            training={"max_steps": STEPS, "weight_decay": 0.1, "warmup_steps": 1, "lr_scheduler_type": "linear"},
            evaluation={"exact_match": False},
        )
        for kind, method in KINDS
    }


@pytest.fixture(scope="module")
def whole(recipes: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """Run folders of each kind, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    runs = {}
    for kind, recipe in recipes.items():
        runs[kind] = folder / "-".join(kind)
        assert train(recipe, runs[kind]) == 0
    return runs


def train(recipe: Path, out: Path, *options: object) -> int:
    return run(cli, ["train", str(recipe), "-o", str(out), *map(str, options)])


@contextlib.contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Ctrl-C when that step has been taken, before it is logged or saved."""
    on_step_end = TrainingProgress.on_step_end

    def interrupt(self: TrainingProgress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt
        on_step_end(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingProgress, "on_step_end", interrupt)
        yield


@contextlib.contextmanager
def steps_taken() -> Iterator[list[int]]:
    on_step_end = TrainingProgress.on_step_end
    taken: list[int] = []

    def note(self: TrainingProgress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        taken.append(state.global_step)
        on_step_end(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingProgress, "on_step_end", note)
        yield taken


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, tuple[float, float, float]]:
    """Loss, norm of the gradient and learning rate of each step; a step that is there twice is an error."""
    rows = [row for row in metrics(folder) if "loss" in row]
    found = {row["step"]: (row["loss"], row["grad_norm"], row["learning_rate"]) for row in rows}
    assert len(found) == len(rows)
    return found


def assert_same_run(folder: Path, reference: Path) -> None:
    """Losses, adapter, cores and measures, bit for bit."""
    assert losses(folder) == losses(reference)
    names = {path.name for path in (reference / "adapter").glob("*.safetensors")}
    assert {path.name for path in (folder / "adapter").glob("*.safetensors")} == names
    for name in names:
        found, expected = (load_file(f / "adapter" / name) for f in (folder, reference))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    left, right = (
        read_run(f).model_dump(exclude={"train_seconds", "timed_steps", "peak_bytes"}) for f in (folder, reference)
    )
    assert left == right


def stopped(recipe: Path, out: Path, step: int = STOP) -> Path:
    """A run that was interrupted in that step."""
    with interrupted_at(step):
        assert train(recipe, out) == 130
    return out


@pytest.fixture
def recipe(recipes: dict[tuple[str, str], Path]) -> Path:
    return recipes["llama", "lora-over"]


@pytest.fixture(scope="module")
def halted(recipes: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """Run folders of each kind, interrupted in step `STOP`; copy one before you change it."""
    folder = tmp_path_factory.mktemp("halted")
    return {kind: stopped(recipe, folder / "-".join(kind)) for kind, recipe in recipes.items()}


# Whole runs


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_resumed_run_equals_one_that_was_never_interrupted(
    kind: tuple[str, str], recipes: dict[Any, Path], whole: dict[Any, Path], halted: dict[Any, Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(halted[kind], tmp_path / "out"))
    with steps_taken() as taken:
        assert train(recipes[kind], out, "--resume") == 0
    assert taken == [5, 6, 7]
    assert_same_run(out, whole[kind])
    assert losses(whole[kind])[1] != losses(whole[kind])[2]


@pytest.mark.parametrize("kind", KINDS[:2], ids="-".join)
def test_a_run_interrupted_before_its_first_checkpoint_starts_again(
    kind: tuple[str, str], recipes: dict[Any, Path], whole: dict[Any, Path], tmp_path: Path
) -> None:
    out = stopped(recipes[kind], tmp_path / "out", step=2)
    assert last_whole_checkpoint(out / "trainer") is None
    assert train(recipes[kind], out, "--resume") == 0
    assert_same_run(out, whole[kind])


@needs_order_of_batches
def test_a_run_can_be_interrupted_again_and_again(recipe: Path, whole: dict[Any, Path], tmp_path: Path) -> None:
    out = stopped(recipe, tmp_path / "out", step=4)
    for step in (5, 6, 7):
        with interrupted_at(step):
            assert train(recipe, out, "--resume") == 130
        assert not (out / "run.json").exists()
    assert train(recipe, out, "--resume") == 0
    assert_same_run(out, whole["llama", "lora-over"])


@pytest.mark.parametrize("kind", KINDS[:2], ids="-".join)
def test_a_run_interrupted_after_its_last_step_takes_no_more(
    kind: tuple[str, str],
    recipes: dict[Any, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its rate does not end at zero, so that a step too many shows."""
    recipe = recipes[kind]
    constant = ("--set", "training.lr_scheduler_type=constant")
    assert train(recipe, tmp_path / "whole", *constant) == 0
    measure = loraover.training.run._measure

    def interrupt(*arguments: Any) -> Any:
        if arguments[-1] == "after training":
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(loraover.training.run, "_measure", interrupt)
    out = tmp_path / "out"
    assert train(recipe, out, *constant) == 130
    monkeypatch.undo()
    with steps_taken() as taken:
        assert train(recipe, out, *constant, "--resume") == 0
    assert taken == []
    assert_same_run(out, tmp_path / "whole")


def test_metrics_of_a_resumed_run_tell_each_thing_once(
    recipe: Path, whole: dict[Any, Path], halted: dict[Any, Path], tmp_path: Path
) -> None:
    kind = ("llama", "lora-over")
    out = Path(shutil.copytree(halted[kind], tmp_path / "out"))
    assert [row["step"] for row in metrics(out)] == [0, 1, 2, 3, 4, 5]
    assert train(recipe, out, "--resume") == 0
    told = [[(row["step"], row.get("loss"), row.get("eval_loss")) for row in metrics(f)] for f in (out, whole[kind])]
    assert told[0] == told[1]


@pytest.mark.parametrize("tail", ['{"step": 5, "lo', "\0\0\0\0"])
def test_metrics_that_were_cut_off_are_mended(
    tail: str, recipe: Path, whole: dict[Any, Path], halted: dict[Any, Path], tmp_path: Path
) -> None:
    kind = ("llama", "lora-over")
    out = Path(shutil.copytree(halted[kind], tmp_path / "out"))
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:-1]) + tail)
    assert train(recipe, out, "--resume") == 0
    assert losses(out) == losses(whole[kind])


def test_an_interrupted_run_says_how_to_go_on(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped(recipe, tmp_path / "out", step=3)
    advice, message = capsys.readouterr().err.split("\n\n")  # click ends the line of the ^C
    assert "--resume" in advice
    assert message == f"{INTERRUPTED}\n"


KILL = """
import os, signal, sys, torch
torch.set_num_threads(1)
from loraover.training.progress import TrainingProgress
def kill(self, args, state, control, **kwargs):
    if state.global_step == STEP:
        os.kill(os.getpid(), signal.SIGKILL)
TrainingProgress.on_step_end = kill
from loraover.cli import main
main()
"""


def test_a_killed_process_is_resumed_by_another(recipe: Path, whole: dict[Any, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILL.replace("STEP", "5", 1), "train", str(recipe), "-o", str(out)]
    ended = subprocess.run(command, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert read_failure(out) is None
    with steps_taken() as taken:
        assert train(recipe, out, "--resume") == 0
    assert taken == [5, 6, 7]
    assert_same_run(out, whole["llama", "lora-over"])


# Half-written checkpoints


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def unlink(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no seal": lambda folder: (folder / SEAL_FILE).unlink(),
    "no seal, and half the files": lambda folder: unlink(folder, SEAL_FILE, "optimizer.pt", "trainer_state.json"),
    "an empty seal": lambda folder: (folder / SEAL_FILE).write_text(""),
    "a truncated seal": lambda folder: truncate(folder / SEAL_FILE),
    "a seal of something else": lambda folder: (folder / SEAL_FILE).write_text('{"files": {"gone": "00"}}'),
    "a truncated adapter": lambda folder: truncate(folder / "adapter_model.safetensors"),
    "truncated cores": lambda folder: truncate(folder / "loraover.safetensors"),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "a flipped bit in the optimizer": lambda folder: flip(folder / "optimizer.pt"),
    "an empty state": lambda folder: (folder / "trainer_state.json").write_text(""),
    "no random state": lambda folder: (folder / "rng_state.pth").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage: Callable[[Path], object], halted: dict[Any, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(halted["llama", "lora-over"] / "trainer", tmp_path / "trainer"))
    assert last_whole_checkpoint(folder) == folder / "checkpoint-4"
    damage(folder / "checkpoint-4")
    assert last_whole_checkpoint(folder) == folder / "checkpoint-2"
    damage(folder / "checkpoint-2")
    assert last_whole_checkpoint(folder) is None


@pytest.mark.parametrize("kind", KINDS[:2], ids="-".join)
@pytest.mark.parametrize("name", ["no seal", "a truncated adapter"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    name: str,
    kind: tuple[str, str],
    recipes: dict[Any, Path],
    whole: dict[Any, Path],
    halted: dict[Any, Path],
    tmp_path: Path,
) -> None:
    out = Path(shutil.copytree(halted[kind], tmp_path / "out"))
    DAMAGE[name](out / "trainer" / "checkpoint-4")
    with steps_taken() as taken:
        assert train(recipes[kind], out, "--resume") == 0
    assert taken == [3, 4, 5, 6, 7]
    assert_same_run(out, whole[kind])


def test_an_interruption_while_a_checkpoint_is_sealed_costs_that_checkpoint_only(
    recipe: Path, whole: dict[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(folder: Path) -> None:
        if folder.name == "checkpoint-6":
            raise KeyboardInterrupt
        seal(folder)

    monkeypatch.setattr(loraover.callbacks.seal_checkpoints, "seal", interrupt)
    out = tmp_path / "out"
    assert train(recipe, out) == 130
    monkeypatch.undo()
    assert (out / "trainer" / "checkpoint-6" / "trainer_state.json").is_file()
    assert last_whole_checkpoint(out / "trainer") == out / "trainer" / "checkpoint-4"
    assert train(recipe, out, "--resume") == 0
    assert_same_run(out, whole["llama", "lora-over"])


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


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path / "nothing") is None
    assert last_whole_checkpoint(tmp_path) is None
    for name in ("checkpoint-", "checkpoint-last", "checkpoint-5-old", "tmp-checkpoint-7"):
        shutil.copytree(checkpoint(tmp_path / "made", 1), tmp_path / name)
        seal(tmp_path / name)
        shutil.rmtree(tmp_path / "made")
    (tmp_path / "checkpoint-9").write_text("a file")
    assert last_whole_checkpoint(tmp_path) is None


# Requests that are refused


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--seed", "3"], "training"),
        (["--learning-rate", "0.5"], "training"),
        (["--method", "lora"], "method"),
        (["--set", "lora.r=8"], "lora"),
        (["--set", "over.decomposition=svd"], "over"),
        (["--set", "data.train_examples=24"], "data"),
    ],
    ids=str,
)
def test_another_recipe_does_not_resume_the_run(
    options: list[str],
    named: str,
    recipe: Path,
    halted: dict[Any, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = Path(shutil.copytree(halted["llama", "lora-over"], tmp_path / "out"))
    before = tree(out)
    assert train(recipe, out, "--resume", *options) == 2
    error = capsys.readouterr().err
    assert "another recipe" in error
    assert f"({named} differ)" in error
    assert tree(out) == before


def test_the_recipe_of_the_run_folder_resumes_it(
    whole: dict[Any, Path], halted: dict[Any, Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(halted["llama", "lora-over"], tmp_path / "out"))
    assert train(out / "recipe.yaml", out, "--resume") == 0
    assert_same_run(out, whole["llama", "lora-over"])


def test_a_finished_run_is_not_resumed(
    recipe: Path, whole: dict[Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = whole["llama", "lora-over"]
    before = tree(out)
    assert train(recipe, out, "--resume") == 2
    assert "finished already" in capsys.readouterr().err
    assert tree(out) == before


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a file", "other files"])
def test_what_is_no_run_is_not_resumed(
    there: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    match there:
        case "an empty folder":
            out.mkdir()
        case "a file":
            out.write_text("mine")
        case "other files":
            out.mkdir()
            (out / "mine").write_text("mine")
    before = tree(tmp_path)
    assert train(recipe, out, "--resume") == 2
    assert "holds no run to resume" in capsys.readouterr().err
    assert tree(tmp_path) == before
    assert out.exists() == (there != "nothing")


@pytest.mark.parametrize("content", ["", "a: ["])
def test_a_run_whose_recipe_is_damaged_is_not_resumed(
    content: str, recipe: Path, halted: dict[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(halted["llama", "lora-over"], tmp_path / "out"))
    (out / "recipe.yaml").write_text(content)
    assert train(recipe, out, "--resume") == 2
    assert str(out / "recipe.yaml") in capsys.readouterr().err


def test_an_interrupted_run_is_not_started_over_by_mistake(
    recipe: Path, halted: dict[Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = halted["llama", "lora-over"]
    before = tree(out)
    assert train(recipe, out) == 2
    assert "exists already" in capsys.readouterr().err
    assert tree(out) == before


def test_the_recipe_of_a_run_is_there_from_its_first_step(halted: dict[Any, Path]) -> None:
    for (_, method), out in halted.items():
        assert yaml.safe_load((out / "recipe.yaml").read_text())["method"] == method
        assert not (out / "adapter").exists()
        assert not (out / "run.json").exists()
