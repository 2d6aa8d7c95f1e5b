"""Runs that are interrupted on purpose, and resumed."""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loraover
from loraover.training.run.failure import FAILURE_FILE
from loraover.training.run.trainer import TrainingProgress
from loraover.training.run_result import read_run

from support.children import Child
from support.train_command import train
from support.trained_run import metrics

STEPS = 7
STOP = 6
"""Checkpoints are written at 2, 4, 6 and 7, and 5 steps make an epoch: a run that stops in step 6 resumes from 4."""

KINDS = ("llama", "t5")


@contextlib.contextmanager
def interrupted_at(step: int, sent: signal.Signals = signal.SIGINT) -> Iterator[None]:
    """Ctrl-C, or another signal, when that step has been taken, before it is logged or saved."""
    on_step_end = TrainingProgress.on_step_end

    def interrupt(self: TrainingProgress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            signal.raise_signal(sent)
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


def assert_resumes(whole: Path, folder: Path, *lost: int, recipe: Any = None) -> None:
    """A copy of a finished run that has lost its result and these checkpoints takes their steps again, bit for bit."""
    names = [f"checkpoint-{step}" for step in lost]
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("adapter", "run.json", *names))
    kept = max(int(path.name.partition("-")[2]) for path in (folder / "trainer").glob("checkpoint-*"))
    resumed = loraover.train(recipe or folder / "recipe.yaml", folder, resume=True)
    assert resumed.timed_steps == resumed.steps - kept
    assert_same_run(folder, whole)


def stopped(recipe: Path, out: Path, step: int = STOP) -> Path:
    """A run that was interrupted in that step."""
    with interrupted_at(step):
        assert train(recipe, out) == 130
    return out


def killed(recipe: Path, out: Path, step: int = STOP) -> Path:
    """A run that was killed in that step, so that it could not say anything or tidy up."""
    with interrupted_at(step, signal.SIGKILL):
        assert Child(lambda: train(recipe, out)).end().code == -signal.SIGKILL
    assert not (out / FAILURE_FILE).exists()
    return out
