"""`loraover train --ray`: the workers of Ray Train are the processes of a run."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from threading import Thread

import psutil
import pytest

from loraover.common.extras import install
from loraover.training.run_result import read_run

from support.train_command import STEPS, train
from support.trained_run import loss, losses

pytestmark = pytest.mark.process

ROWS = ("--set", "data.train_examples=24")
HALF = (*ROWS, "--set", "training.gradient_accumulation_steps=1")


@pytest.mark.parametrize(
    ("words", "rank", "named"),
    [
        (["--workers", "2"], None, "--workers needs --ray, which is missing"),
        (["--ray", "local", "--plan"], None, "give the command without --plan"),
        (["--ray", "local"], None, f"--ray needs Ray: {install('ray')}"),
        (["--ray", "local"], "0", "give the command without a launcher"),
    ],
)
def test_what_ray_cannot_train_is_refused(
    words: list[str],
    rank: str | None,
    named: str,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert train(recipe, tmp_path / "out", *words) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.matrix
def test_two_workers_of_ray_train_as_one_process_does_and_start_again(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker is killed when a checkpoint is complete; Ray starts both again."""
    assert train(recipe, tmp_path / "one", *ROWS, "--set", "training.gradient_accumulation_steps=2") == 0
    ray = ("--ray", "local", "--workers", "2")
    assert train(recipe, tmp_path / "refused", *HALF, *ray, "--set", "lora.target_modules=[nothing]") == 2
    killer = Thread(target=kill_a_worker, args=(tmp_path / "two",))
    killer.start()
    assert train(recipe, tmp_path / "two", *HALF, *ray) == 0
    killer.join()
    found, expected = read_run(tmp_path / "two"), read_run(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert (found.processes, found.steps) == (2, STEPS)
    assert found.timed_steps < STEPS
    assert loss(found.after) == pytest.approx(loss(expected.after), rel=1e-5)
    told = capsys.readouterr()
    assert "nothing" in told.err
    assert f"step     {STEPS}/{STEPS}" in told.out


def kill_a_worker(run: Path) -> None:
    """Kill one of the run's workers when a checkpoint is there."""
    workers: list[psutil.Process] = []
    while not (workers and any(run.glob("trainer/checkpoint-*/complete.json"))):
        running = psutil.process_iter(["cmdline"])
        workers = workers or [p for p in running if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])]
        time.sleep(0.01)
    os.kill(workers[0].pid, signal.SIGKILL)
