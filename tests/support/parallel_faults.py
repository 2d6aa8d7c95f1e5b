"""A script for torchrun --max-restarts 6: `loraover train` with a fault in each attempt but the last.

    torchrun --standalone --nproc-per-node 2 --max-restarts 6 support/parallel_faults.py FOLDER RECIPE

The faults are those of `FAULTS`: a process is killed, or the disk of FOLDER is full when rank 0 saves a checkpoint.
Each process that survives an attempt leaves what it saw, and the steps that it took, beside RECIPE, in
fault-<attempt>-<rank>.json.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from loraover.training.run import measure, train
from loraover.training.run.trainer import TrainingProgress

from support.parallel_command import STEPS, called, halves

FAULTS: tuple[tuple[str, int, list[int]], ...] = (
    ("step", 1, [1]),
    ("disk", 0, [3]),
    ("save", 0, [3]),
    ("save", 1, [3]),
    ("evaluation", 0, [3]),
    ("evaluation", 1, []),
)
"""What fails in each attempt, the rank in which it does, and the step that the attempt begins with.

A checkpoint is saved at steps 2 and 4, so that the last evaluation begins without a step.
"""


SEAL = "loraover.callbacks.seal_checkpoints.publish_text"


def killed(*places: Any, **keywords: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_evaluation(patch: pytest.MonkeyPatch) -> None:
    """Kill this process after the first batch of the held-out rows, when training has ended."""
    measured, losses = train.measure, measure.example_losses  # type: ignore[attr-defined]

    def evaluated(*places: Any, **options: Any) -> Any:
        if places[-1] == measure.AFTER:
            patch.setattr(measure, "example_losses", lambda model, rows, on_batch: losses(model, rows, on_batch=killed))
        return measured(*places, **options)

    patch.setattr(train, "measure", evaluated)


def main(folder: Path, recipe: Path) -> None:
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which torchrun ends this process before it has written
    fault, at, _ = FAULTS[attempt] if attempt < len(FAULTS) else ("", 0, [])
    on_step_end, filler, patch = TrainingProgress.on_step_end, folder / "filler", pytest.MonkeyPatch()
    steps: list[int] = []

    def step_ends(self: TrainingProgress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps.append(state.global_step)
        if (fault, at, state.global_step) == ("step", rank, 3):
            killed()
        if (fault, at, state.global_step) == ("disk", rank, STEPS):
            filler.write_bytes(bytes(shutil.disk_usage(folder).free - 8192))
        if (fault, at, state.global_step) == ("save", rank, STEPS):  # rank 0 when all files but the seal are there
            patch.setattr(("transformers.Trainer._save_rng_state", SEAL)[rank == 0], killed)
        on_step_end(self, args, state, control, **kwargs)

    patch.setattr(TrainingProgress, "on_step_end", step_ends)
    if (fault, at) == ("evaluation", rank):
        kill_in_evaluation(patch)
    found = called(recipe, "-o", folder / "run", *halves("--resume", "auto")) | {"steps": steps}
    if rank == 0:
        filler.unlink(missing_ok=True)
    (recipe.parent / f"fault-{attempt}-{rank}.json").write_text(json.dumps(found))
    sys.exit(found["code"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
