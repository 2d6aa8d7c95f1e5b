"""A script for two processes that are started again: `loraover train` with a fault in each attempt but the last.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 support/parallel_faults.py FOLDER RECIPE

Rank 1 is killed in a step, then it stops answering, and then the disk of FOLDER is full when rank 0 saves a checkpoint.
Each process that survives an attempt leaves what it saw in FOLDER/<attempt>-<rank>.json.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from loraover.training.progress import TrainingProgress

from support.parallel_command import STEPS, called, halves

LOST_IN = 3
PATIENCE_S = 4
FAULTS = {"killed": (0, 1, LOST_IN), "stopped": (1, 1, LOST_IN), "full": (2, 0, STEPS)}
"""Attempt, rank and step of each fault."""


def main(folder: Path, recipe: Path) -> None:
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which torchrun ends this process before it has written
    on_step_end = TrainingProgress.on_step_end
    filler = folder / "filler"

    def fault(self: TrainingProgress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        here = (attempt, rank, state.global_step)
        if here == FAULTS["killed"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if here == FAULTS["stopped"]:
            (folder / "stopped.pid").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        if here == FAULTS["full"]:
            filler.write_bytes(bytes(shutil.disk_usage(folder).free - 8192))
        on_step_end(self, args, state, control, **kwargs)

    TrainingProgress.on_step_end = fault  # type: ignore[method-assign]
    patience = ("--set", f"training.ddp_timeout={PATIENCE_S}")
    found = called(recipe, "-o", folder / "run", *halves(*patience, "--resume", "auto"))
    if rank == 0:
        filler.unlink(missing_ok=True)
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((folder / "stopped.pid").read_text()), signal.SIGKILL)
    (folder / f"{attempt}-{rank}.json").write_text(json.dumps(found))
    if found["code"]:
        os._exit(found["code"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
