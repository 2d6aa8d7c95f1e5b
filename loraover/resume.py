"""Whole checkpoints: sealed when they are complete, and only then resumed from.

The Trainer writes a checkpoint file by file into its place, so a killed run leaves a folder that looks like one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraover.adapter_dir import read_json
from loraover.errors import CheckpointError
from loraover.output import publish_file, sync
from loraover.tensor_file import sha256_of

SEAL_FILE = "complete.json"


class Seal(BaseModel):
    """Contents of `complete.json`: SHA-256 of every other file of the checkpoint."""

    files: dict[str, str]


class SealCheckpoints(TrainerCallback):
    """Marks each checkpoint complete once all of its files are on disk; put it behind other callbacks that save."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.should_save:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def seal(folder: Path) -> None:
    """Sync every file of a checkpoint, then write its seal."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL_FILE)
    for path in paths:
        sync(path)
    content = Seal(files={str(p.relative_to(folder)): sha256_of(p) for p in paths}).model_dump_json(indent=1)
    publish_file(folder / SEAL_FILE, lambda draft: draft.write_text(content))


def last_whole_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The latest `checkpoint-N` whose seal is there and true; None without one."""
    folders = [p for p in Path(directory).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    for folder in sorted(folders, key=lambda p: -int(p.name.removeprefix("checkpoint-"))):
        if _is_whole(folder):
            return folder
    return None


def _is_whole(folder: Path) -> bool:
    try:
        files = read_json(folder / SEAL_FILE, Seal).files
    except CheckpointError:
        return False
    return all((folder / name).is_file() and sha256_of(folder / name) == digest for name, digest in files.items())
