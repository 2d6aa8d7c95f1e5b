"""Seals: lists of checksums that mark a checkpoint as complete, so that no run resumes from an incomplete one.

The Trainer writes a checkpoint file by file into its final folder, so a killed run can leave an incomplete folder that
looks like a checkpoint. It also deletes old checkpoints before the callbacks have finished the new one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraover.checkpoint.checkpoint import SEAL_FILE
from loraover.checkpoint.tensor_file import sha256_of
from loraover.common.atomic_output import publish_text, sync
from loraover.common.errors import CheckpointError, ConfigError
from loraover.common.strict_json import read_json
from loraover.overparam.parameterization import has_cores
from loraover.overparam.sharding import wait_for_all


class Seal(BaseModel):
    """Contents of `complete.json`."""

    files: dict[str, str] = Field(description="SHA-256 of every other file of the checkpoint, by its path.")


class SealCheckpoints(TrainerCallback):
    """Callback that marks each checkpoint as complete once all of its files are on disk.

    Put it behind other callbacks that write into checkpoints. During training it also takes over the Trainer's
    `save_total_limit`: older checkpoints that have a seal are deleted only after the new one is complete, and the best
    one is never deleted.

    Example:
        ```python
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

        from loraover import LoraOverCallback, SealCheckpoints, last_whole_checkpoint

        base = "HuggingFaceTB/SmolLM2-135M-Instruct"
        tokens = AutoTokenizer.from_pretrained(base)("2 + 2 = 4")["input_ids"]
        data = [{"input_ids": tokens, "labels": tokens}]
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear"))
        args = TrainingArguments("run", max_steps=4, save_steps=2)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[LoraOverCallback(), SealCheckpoints()])
        trainer.train(resume_from_checkpoint=last_whole_checkpoint("run"))  # None begins at the first step
        ```
    """

    def __init__(self) -> None:
        self._limit: int | None = None
        self._saw_cores = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the Trainer's `save_total_limit`."""
        if self._limit is None:  # an interrupted run has left it set
            self._limit = args.save_total_limit
        args.save_total_limit = None
        self._saw_cores = has_cores(kwargs.get("optimizer"))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that this callback comes after the one that trains through cores; a ConfigError if not."""
        if has_cores(kwargs.get("optimizer")) and not self._saw_cores:
            raise ConfigError(
                "SealCheckpoints comes before LoraOverCallback, so it would seal checkpoints that lack their cores; "
                "put it behind: callbacks=[LoraOverCallback(...), SealCheckpoints()]."
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal the new checkpoint, then delete those beyond the limit."""
        wait_for_all()  # each process writes its own random state
        if not args.should_save:
            return
        newest = checkpoint_folder(args, state)
        seal(newest)
        if self._limit is not None and self._limit > 0:  # the Trainer, too, takes 0 and less for no limit
            # Neither counted nor deleted are checkpoints of later steps, left by a run that was then resumed from an
            # earlier one, and those without a seal, which may have been saved before this callback was in use.
            sealed = [folder for folder in checkpoints(newest.parent) if (folder / SEAL_FILE).is_file()]
            best = state.best_model_checkpoint
            for folder in sealed[sealed.index(newest) :][self._limit :]:
                if best is None or folder.resolve() != Path(best).resolve():
                    shutil.rmtree(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the Trainer its `save_total_limit` back."""
        args.save_total_limit, self._limit = self._limit, None


def seal(folder: str | os.PathLike[str]) -> None:
    """Mark a checkpoint as complete: write all of its files to disk, then the list of their checksums.

    Call it when every file of the checkpoint has been written.

    Args:
        folder: Folder of the checkpoint. `complete.json` is written there.

    Raises:
        OutputError: The file cannot be written.
    """
    folder = Path(folder)
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL_FILE)
    for path in paths:
        sync(path)
    content = Seal(files={str(p.relative_to(folder)): sha256_of(p) for p in paths}).model_dump_json(indent=1)
    publish_text(folder / SEAL_FILE, content)


def last_whole_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """Find the newest complete checkpoint in a folder.

    Complete means that the checkpoint has a seal, and that every file in it has the checksum that the seal names.

    Args:
        directory: Folder that holds the `checkpoint-N` folders, such as the Trainer's `output_dir`.

    Returns:
        The complete checkpoint with the highest number, or None.

    Raises:
        CheckpointError: A file of a newer checkpoint, which may be complete, cannot be read.
    """
    for folder in checkpoints(directory):
        try:
            with (folder / SEAL_FILE).open("rb"):  # whose errors are of the system, not of the content
                files = read_json(folder / SEAL_FILE, Seal).files
            if all((folder / name).is_file() and sha256_of(folder / name) == digest for name, digest in files.items()):
                return folder
        except (FileNotFoundError, CheckpointError):
            continue
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or folder}: cannot be read: {error.strerror or error}, so it is not known whether "
                "the checkpoint is complete. Make it readable, or move the checkpoint away to resume from an earlier "
                "one."
            ) from error
    return None


def checkpoints(directory: str | os.PathLike[str]) -> list[Path]:
    """Return the folders `checkpoint-N`, complete or not, the newest first."""
    named = (p for p in Path(directory).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal())
    return sorted(filter(Path.is_dir, named), key=lambda p: -int(p.name.removeprefix("checkpoint-")))


def remove_incomplete(directory: str | os.PathLike[str], step: int) -> None:
    """Remove the checkpoints of later steps than the newest complete one, from which a run continues.

    Otherwise files that only another number of processes writes would stay in the new checkpoint of that step.
    """
    for folder in checkpoints(directory):
        if int(folder.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(folder)


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the Trainer's checkpoint at the present step.

    A trial of `hyperparameter_search` has a folder of its own in the output folder, whose name callbacks are not given:
    it is the one in which the Trainer has written the state of this trial last.
    """
    output, name = Path(args.output_dir), f"checkpoint-{state.global_step}"
    if not state.is_hyper_param_search:
        return output / name
    written = [
        path
        for path in output.rglob(f"{name}/trainer_state.json")
        if TrainerState.load_from_json(str(path)).trial_params == state.trial_params
    ]
    return max(written, key=lambda path: path.stat().st_mtime_ns).parent if written else output / name
