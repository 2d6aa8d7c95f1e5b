"""Whole checkpoints: sealed when they are complete, and only then resumed from.

The Trainer writes a checkpoint file by file into its place, so a killed run leaves a folder that looks like one; and it
deletes old checkpoints before the callbacks have finished the new one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraover.checkpoint.tensor_file import sha256_of
from loraover.common.atomic_output import publish_text, sync
from loraover.common.errors import CheckpointError, ConfigError
from loraover.common.strict_json import read_json
from loraover.overparam.parameterization import has_cores
from loraover.overparam.sharding import wait_for_all

SEAL_FILE = "complete.json"


class Seal(BaseModel):
    """Contents of `complete.json`: SHA-256 of every other file of the checkpoint."""

    files: dict[str, str]


class SealCheckpoints(TrainerCallback):
    """Marks each checkpoint complete once all of its files are on disk; put it behind other callbacks that save.

    While it trains, it does the work of `save_total_limit`: once the new checkpoint is complete, older ones that it has
    sealed go; never the best one.

        callbacks = [LoraOverCallback(config), SealCheckpoints()]
        trainer = Trainer(model, args, train_dataset=data, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(args.output_dir))
    """

    def __init__(self) -> None:
        self._limit: int | None = None
        self._saw_cores = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._limit is None:  # it is still there after a run that was interrupted
            self._limit = args.save_total_limit
        args.save_total_limit = None
        self._saw_cores = has_cores(optimizer)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if has_cores(optimizer) and not self._saw_cores:
            raise ConfigError(
                "SealCheckpoints comes before LoraOverCallback, so it would seal checkpoints that lack their cores; "
                "put it behind: callbacks=[LoraOverCallback(...), SealCheckpoints()]."
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        wait_for_all()  # each process writes its own random state
        if not args.should_save:
            return
        newest = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        seal(newest)
        if self._limit is not None:
            best = state.best_model_checkpoint
            for folder in _superfluous(newest, self._limit):
                if best is None or folder.resolve() != Path(best).resolve():
                    shutil.rmtree(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        args.save_total_limit, self._limit = self._limit, None


def seal(folder: Path) -> None:
    """Sync every file of a checkpoint, then write its seal."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL_FILE)
    for path in paths:
        sync(path)
    content = Seal(files={str(p.relative_to(folder)): sha256_of(p) for p in paths}).model_dump_json(indent=1)
    publish_text(folder / SEAL_FILE, content)


def last_whole_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The latest `checkpoint-N` whose seal is there and true; None without one."""
    return next(filter(_is_whole, checkpoints(directory)), None)


def checkpoints(directory: str | os.PathLike[str]) -> list[Path]:
    """Folders `checkpoint-N`, whole or not, the latest first."""
    folders = [p for p in Path(directory).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(folders, key=lambda p: -int(p.name.removeprefix("checkpoint-")))


def _superfluous(newest: Path, limit: int) -> list[Path]:
    """Sealed checkpoints before the newest that `limit` leaves no room for.

    Those of later steps, which the run has come back from, and those without a seal, which may be whole and older than
    this callback's use, are not counted and stay.
    """
    sealed = [folder for folder in checkpoints(newest.parent) if (folder / SEAL_FILE).is_file()]
    return sealed[sealed.index(newest) :][max(1, limit) :]


def _is_whole(folder: Path) -> bool:
    try:
        files = read_json(folder / SEAL_FILE, Seal).files
    except CheckpointError:
        return False
    return all((folder / name).is_file() and sha256_of(folder / name) == digest for name, digest in files.items())
