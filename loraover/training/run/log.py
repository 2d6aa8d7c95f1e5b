"""The log of a run, `metrics.jsonl`: one object per logging step and measure."""

from __future__ import annotations

import json
import math
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
    """Remove lines from the log that a resumed run will write again, and lines that were cut off.

    These are the lines of later steps, and the measures after training.
    """
    path = output / METRICS_FILE
    if not path.is_file():
        return
    step = step_of(checkpoint)
    kept = []
    for line in _lines(path):
        row = _parsed(line)
        logged = row.get("step")
        is_own = "eval_loss" in row and "eval_runtime" not in row  # the Trainer's own measures have that
        if isinstance(logged, int) and 0 <= logged <= step and not (is_own and logged > 0):
            kept.append(line)
    publish_text(path, "".join(line + "\n" for line in kept))


def logged_losses(output: Path) -> list[float]:
    """Return the finite training losses of a run's log, by step; lines that cannot be read are skipped."""
    found = (_parsed(line).get("loss") for line in _lines(output / METRICS_FILE))
    return [loss for loss in found if isinstance(loss, float) and math.isfinite(loss)]


def _lines(metrics: Path) -> list[str]:
    return metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.is_file() else []


def _parsed(line: str) -> dict[str, object]:
    """Return what a line of the log holds; nothing if it was cut off."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}
