"""Progress of the Trainer's steps, and their log as a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraover.common.provenance import peak_bytes
from loraover.common.reporter import Reporter


class TrainingProgress(TrainerCallback):
    """Shows the Trainer's steps and writes its log, with the schedule's decisions, to a JSONL file.

    Set `advance` to a function that is called with the number of steps taken so far.

    Args:
        report: Receiver of losses.
        metrics: The JSONL file, to which lines are appended; None: another process writes it.
    """

    def __init__(self, report: Reporter, metrics: Path | None) -> None:
        self.report = report
        self.metrics = metrics
        self._written = 0
        self.advance: Callable[[int], None] = lambda done: None
        self.advance_evaluation: Callable[[int], None] = lambda done: None
        self._evaluated = 0
        self._begun = self._logged = (0, 0.0)  # steps or tokens, and the time

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._written = len(state.log_history)
        self._begun = (state.global_step, time.perf_counter())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.advance(state.global_step)
        self._write(state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._evaluated += args.per_device_eval_batch_size
        self.advance_evaluation(self._evaluated)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._write(state)
        if logs is not None and "loss" in logs:
            loss = f"step {state.global_step:>5}/{state.max_steps}  loss {float(logs['loss']):.4f}"
            self.report.line(", ".join((loss, *self._pace(state, logs))))

    def _pace(self, state: TrainerState, logs: dict[str, Any]) -> Iterator[str]:
        """Yield tokens per second since the last line, where the trainer counts tokens, peak memory and time left."""
        now = time.perf_counter()
        if "num_tokens" in logs:
            (before, then), self._logged = self._logged, (logs["num_tokens"], now)
            if 0 < before < logs["num_tokens"]:
                yield f"{(logs['num_tokens'] - before) / (now - then):,.0f} tokens/s"
        yield f"peak {peak_bytes() / 1e9:.2f} GB"
        first, begun = self._begun
        if (left := state.max_steps - state.global_step) and state.global_step > first:
            yield f"{timedelta(seconds=round(left * (now - begun) / (state.global_step - first)))} left"

    def _write(self, state: TrainerState) -> None:
        if self.metrics is None:
            return
        rows = state.log_history[self._written :]
        with self.metrics.open("a") as file:
            file.writelines(json.dumps({"step": row["step"], **row}) + "\n" for row in rows)
        self._written += len(rows)
