"""A script for torchrun --max-restarts 2: `loraover train` with a fault in each attempt but the last.

    torchrun --standalone --nproc-per-node 2 --max-restarts 2 support/parallel_faults.py FOLDER RECIPE

First rank 1 is killed in a step, then the disk of FOLDER is full when rank 0 saves a checkpoint. Each process that
survives an attempt leaves what it saw beside RECIPE, in fault-<attempt>-<rank>.json.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from loraover.training.progress import TrainingProgress

from support.parallel_command import STEPS, called, halves

KILLED_IN = 3


def main(folder: Path, recipe: Path) -> None:
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which torchrun ends this process before it has written
    on_step_end = TrainingProgress.on_step_end
    filler = folder / "filler"

    def fault(self: TrainingProgress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (attempt, rank, state.global_step) == (0, 1, KILLED_IN):
            os.kill(os.getpid(), signal.SIGKILL)
        if (attempt, rank, state.global_step) == (1, 0, STEPS):
            filler.write_bytes(bytes(shutil.disk_usage(folder).free - 8192))
        on_step_end(self, args, state, control, **kwargs)

    TrainingProgress.on_step_end = fault  # type: ignore[method-assign]
    found = called(recipe, "-o", folder / "run", *halves("--resume", "auto"))
    if rank == 0:
        filler.unlink(missing_ok=True)
    (recipe.parent / f"fault-{attempt}-{rank}.json").write_text(json.dumps(found))
    sys.exit(found["code"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
