"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Reporter:
    """Tells a person what is going on."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def line(self, text: str) -> None:
        self.console.print(escape(text), soft_wrap=True, highlight=False)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Progress of one piece of work; the block calls what it gets with the amount done so far."""
        if not self.console.is_terminal:
            self.line(f"{label}: {total}")
            yield lambda done: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(escape(label), total=total)
            yield lambda done: progress.update(task, completed=done)


class _ToReporter(logging.Handler):
    def __init__(self, report: Reporter) -> None:
        super().__init__(logging.INFO)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report.line(record.getMessage())


@contextmanager
def log_shown(report: Reporter) -> Iterator[None]:
    """Show what the library logs, such as a schedule's decisions, during a block."""
    logger, handler = logging.getLogger("loraover"), _ToReporter(report)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


class TrainingProgress(TrainerCallback):
    """Shows the Trainer's steps and writes the history of its log, a schedule's decisions too, to a JSONL file."""

    def __init__(self, report: Reporter, metrics: Path) -> None:
        self.report = report
        self.metrics = metrics
        self._written = 0
        self._task: Any = None
        self._advance: Callable[[int], None] = lambda done: None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._written = len(state.log_history)
        self._task = self.report.task("training steps", state.max_steps)
        self._advance = self._task.__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._advance(state.global_step)
        self._write(state)

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
            self.report.line(f"step {state.global_step:>5}/{state.max_steps}  loss {float(logs['loss']):.4f}")

    def _write(self, state: TrainerState) -> None:
        rows = state.log_history[self._written :]
        with self.metrics.open("a") as file:
            file.writelines(json.dumps({"step": row["step"], **row}) + "\n" for row in rows)
        self._written += len(rows)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._task.__exit__(None, None, None)
