"""The log of a run, `metrics.jsonl`: one object per logging step and measure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from loraover.common.atomic_output import publish_text

METRICS_FILE = "metrics.jsonl"


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps taken at one of the trainer's checkpoints; 0 without a checkpoint."""
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))


def log_measures(output: Path, step: int, **measures: float | None) -> None:
    """Append a line to the log; a resumed run has its line of step 0 already."""
    path = output / METRICS_FILE
    if step or not path.is_file():
        with path.open("a") as file:
            file.write(json.dumps({"step": step, **measures}) + "\n")


def trim_metrics(output: Path, checkpoint: Path | None) -> None:
    """Remove from the log what a run that resumes from a checkpoint logs again, and lines that were cut off.

    These are the lines of later steps, and the measures after training.
    """
    path = output / METRICS_FILE
    if not path.is_file():
        return
    step = step_of(checkpoint)
    kept = [line for line in path.read_text().splitlines() if _stays(line, step)]
    publish_text(path, "".join(line + "\n" for line in kept))


def _stays(line: str, step: int) -> bool:
    """Whether a line of the log is complete, not of a later step, and not of the measures after training."""
    try:
        row = json.loads(line)
        logged = int(row["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    is_measured_after = logged > 0 and "eval_loss" in row and "eval_runtime" not in row  # the Trainer's own have that
    return 0 <= logged <= step and not is_measured_after


def logged_losses(output: Path) -> list[float]:
    """Return the finite training losses of a run's log, by step; lines that cannot be read are skipped."""
    rows = _rows(output / METRICS_FILE)
    return [loss for row in rows if isinstance(loss := row.get("loss"), float) and math.isfinite(loss)]


def _rows(metrics: Path) -> Iterator[dict[str, object]]:
    if not metrics.is_file():
        return
    with metrics.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row
