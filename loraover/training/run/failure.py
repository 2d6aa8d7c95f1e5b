"""Reason why a run ended without a result: `failure.json`."""

from __future__ import annotations

import shutil
import traceback
from pathlib import Path
from typing import Literal

from pydantic import Field

from loraover.common.atomic_output import publish_directory, publish_text
from loraover.common.errors import (
    ConfigError,
    DivergedError,
    LoraOverError,
    OutputError,
    ProcessError,
    is_out_of_memory,
)
from loraover.common.strict_json import StrictModel, read_json

FAILURE_FILE = "failure.json"


class Failure(StrictModel):
    """Contents of `failure.json`."""

    schema_version: Literal[1] = 1
    kind: Literal["diverged", "out_of_memory", "refused", "failed"] = Field(
        description="Kind of failure. diverged: weights are no longer finite; out_of_memory: the memory is too small; "
        "refused: an error whose message says what to change; failed: any other error."
    )
    message: str = Field(description="The error's message, for people.")

    @property
    def is_of_method(self) -> bool:
        """Whether the method failed at this rate and size, rather than the request, the machine or the code."""
        return self.kind in ("diverged", "out_of_memory")


def failure_of(error: Exception) -> Failure:
    """Classify an exception that ends a run, by its type."""
    is_ours = isinstance(error, LoraOverError)
    message = str(error) if is_ours else "".join(traceback.format_exception_only(error)).strip()
    kind: Literal["diverged", "out_of_memory", "refused", "failed"]
    if isinstance(error, DivergedError):
        kind = "diverged"
    elif is_out_of_memory(error):
        kind = "out_of_memory"
    else:
        kind = "refused" if is_ours and not isinstance(error, ProcessError) else "failed"
    return Failure(kind=kind, message=message.encode(errors="backslashreplace").decode())  # a path may be no UTF-8


def record_failure(output: Path, error: BaseException, *, has_stepped: bool, is_resumed: bool) -> None:
    """Write a run's failure into its folder after an exception, or remove a folder in which nothing was done.

    A new run that has taken no step leaves no folder, or one with nothing but the failure of its method, so that the
    same command can be given again. Otherwise the folder keeps what it holds, to be resumed. Ctrl-C is not recorded.
    """
    failure = failure_of(error) if isinstance(error, Exception) else None
    is_kept = failure is not None and (has_stepped or failure.is_of_method)
    text = failure.model_dump_json(indent=1) + "\n" if failure is not None and is_kept else None
    try:
        if has_stepped or is_resumed:
            if text is not None:
                publish_text(output / FAILURE_FILE, text)
        elif text is not None:
            with publish_directory(output, replace=True) as draft:
                publish_text(draft / FAILURE_FILE, text)
        else:
            shutil.rmtree(output, ignore_errors=True)
    except OutputError as unwritten:
        error.add_note(str(unwritten))


def explained(error: BaseException, has_stepped: bool) -> BaseException:
    """Say what to change where TRL refuses a setting in its first step, or memory is short, if the error does not."""
    if isinstance(error, LoraOverError):
        return error
    if isinstance(error, ValueError) and not has_stepped and error.__traceback__ is not None:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] == "trl":
            return ConfigError(f"TRL refuses a setting of training, or the data, in the first step: {error}")
    if not is_out_of_memory(error):
        return error
    found = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return ConfigError(
        f"training ran out of memory ({found}). Lower training.per_device_train_batch_size or set it to auto, set "
        "training.gradient_checkpointing to true, or lower training.max_length; --plan estimates what a run needs."
    )


def has_no_work(folder: Path) -> bool:
    """Whether a folder is empty or holds only a failure before the first step, so that a new run may have it."""
    try:
        is_folder = folder.is_dir() and not folder.is_symlink()
        return is_folder and {path.name for path in folder.iterdir()} <= {FAILURE_FILE}
    except OSError:
        return False


def read_failure(folder: Path) -> Failure | None:
    """Read why the last attempt at a run failed; None if it did not, or was interrupted."""
    return read_json(folder / FAILURE_FILE, Failure) if (folder / FAILURE_FILE).is_file() else None
