"""One finished run of a study: `outcome.json`."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from loraover.checkpoint.checkpoint import META_FILE, read_checkpoint
from loraover.checkpoint.exact_tensors import open_exact
from loraover.common.atomic_output import publish_text
from loraover.common.errors import ConfigError, LoraOverError, OutputError
from loraover.common.strict_json import read_json
from loraover.training.failure import FAILURE_FILE, read_failure
from loraover.training.recipe import Recipe, load_recipe
from loraover.training.run import HELD_OUT_FILE
from loraover.training.run_result import RUN_FILE, read_run

OUTCOME_FILE = "outcome.json"
DIVERGED, OUT_OF_MEMORY = "training diverged", "out of memory"
FAILURES = {"diverged": DIVERGED, "out_of_memory": OUT_OF_MEMORY}
"""What an outcome says of the kinds of failure that are the method's."""


class Outcome(BaseModel):
    """What a study needs of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str = Field(description="SHA-256 of the recipe")
    failure: str | None = Field(None, description="why there is no loss")
    nats: list[float] = Field(default_factory=list, description="of each held-out completion")
    tokens: list[int] = Field(default_factory=list)
    step_seconds: float | None = Field(None, description="None: the process that ended the run took no step")
    peak_bytes: int | None = Field(None, description="of PyTorch on a CUDA device, or without one of the process")
    worker: str | None = Field(None, description="of a Ray cluster, that trained")
    hardware: str | None = Field(None, description="on which it was trained")
    trained_parameters: int = Field(0, description="numbers in the cores, and in the matrices without cores")
    served_parameters: int = Field(0, description="numbers in A and B")
    update_norm: float | None = None
    step_norm: float | None = Field(None, description="mean over the logged steps")
    fold_error: float | None = Field(None, description="largest relative Frobenius error of a stored A or B")

    @model_validator(mode="after")
    def _are_pairs(self) -> Outcome:
        if len(self.nats) != len(self.tokens):
            raise ValueError(f"{len(self.nats)} nats and {len(self.tokens)} tokens, expected as many")
        return self


def execute(recipe: Recipe, folder: Path, threads: int) -> Outcome:
    """Train in a process of its own, or go on with a run that was cut off.

    Args:
        folder: of the run; its outcome is written there, and is what a second call returns.
        threads: for the process.

    Raises:
        ConfigError: the run was begun with another recipe.
        OutputError: there is no place for the folder.
        LoraOverError: the run failed for another reason than its rate or its size.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder.parent} cannot be made: {error.strerror}.") from error
    with _alone(folder) as lock:
        found = read_outcome(recipe, folder)
        if found is not None:
            return found
        _check_begun(recipe, folder)
        last = "" if _has_ended(folder) else _train(recipe, folder, threads, lock)
        outcome = _outcome(recipe, folder, last)
        folder.mkdir(exist_ok=True)
        publish_text(folder / OUTCOME_FILE, outcome.model_dump_json() + "\n")
    return outcome


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Hold the run's lock, once nobody else does. Yields its descriptor: a process that inherits that holds it too.

    So a training process whose study was killed is waited for, and two studies of one folder take turns.
    """
    with folder.with_suffix(folder.suffix + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _asked(folder: Path) -> Path:
    """The recipe as the study gave it to the run, without the revisions that the run pins in its own."""
    return folder.with_suffix(folder.suffix + ".yaml")


def _check_begun(recipe: Recipe, folder: Path) -> None:
    """Raise ConfigError of a run that was begun, or finished but for its outcome, with another recipe."""
    begun = any((folder / name).is_file() for name in ("recipe.yaml", FAILURE_FILE))
    if begun and digest(load_recipe(str(_asked(folder)))) != digest(recipe):
        raise _another_recipe(folder)


def _another_recipe(folder: Path) -> ConfigError:
    return ConfigError(f"{folder}: was run with another recipe than this study's; name a new folder.")


def _has_ended(folder: Path) -> bool:
    """Whether a run has a result, or failed for its rate or its size; other failures are tried again."""
    failure = read_failure(folder)
    return (folder / RUN_FILE).is_file() or (failure is not None and failure.is_of_method)


def _train(recipe: Recipe, folder: Path, threads: int, lock: int) -> str:
    """Run `loraover train`, which leaves its result or its failure in the folder.

    Returns:
        The last line that it printed, to be shown where it left neither.
    """
    asked = _asked(folder)
    publish_text(asked, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    command = [sys.executable, "-m", "loraover.cli", "train", str(asked), "-o", str(folder)]
    if (folder / "recipe.yaml").is_file() and not any((folder / name).exists() for name in ("adapter", "model")):
        command.append("--resume")
        (folder / FAILURE_FILE).unlink(missing_ok=True)
    else:
        shutil.rmtree(
            folder, ignore_errors=True
        )  # killed before there was anything to resume, or within its last words
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            pass_fds=[lock],
        )
        try:
            process.wait()
        except KeyboardInterrupt:
            process.wait()  # the terminal has told it as well
            raise
        log.seek(0)
        last = next((line for line in reversed(log.read().splitlines()) if line.strip()), "it printed nothing")
    if process.returncode == -signal.SIGKILL:
        return "something has killed it, as Linux does where memory is short; try fewer --jobs"
    return last


def read_outcome(recipe: Recipe, folder: Path) -> Outcome | None:
    """Of a run that is finished already.

    Raises:
        ConfigError: that run had another recipe.
    """
    if not (folder / OUTCOME_FILE).is_file():
        return None
    found = read_json(folder / OUTCOME_FILE, Outcome)
    if found.recipe != digest(recipe):
        raise _another_recipe(folder)
    return found


def digest(recipe: Recipe) -> str:
    """Of the keys that are not at their defaults, so that a new key leaves finished runs valid.

    Defaults of the decomposition are in it: another one there is another method.
    """
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    if recipe.method == "lora-over":
        values["decomposition"] = repr(recipe.over.make_decomposition())
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _outcome(recipe: Recipe, folder: Path, last: str) -> Outcome:
    if not (folder / RUN_FILE).is_file():
        return Outcome(recipe=digest(recipe), failure=_failure(folder, last))
    result = read_run(folder)
    scored = json.loads((folder / HELD_OUT_FILE).read_text())
    if not all(math.isfinite(nats) for nats, _ in scored):
        return Outcome(recipe=digest(recipe), failure=DIVERGED)
    logged = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    norms = [row["loraover/step_norm"] for row in logged if "loraover/step_norm" in row]
    return Outcome(
        recipe=digest(recipe),
        nats=[nats for nats, _ in scored],
        tokens=[tokens for _, tokens in scored],
        step_seconds=result.train_seconds / result.timed_steps if result.timed_steps else None,
        peak_bytes=result.peak_bytes,
        hardware=result.hardware,
        trained_parameters=result.lora_parameters + result.added_parameters,
        served_parameters=result.lora_parameters,
        update_norm=result.update_norm,
        step_norm=sum(norms) / len(norms) if norms else None,
        fold_error=_fold_error(folder / "adapter"),
    )


def _failure(folder: Path, last: str) -> str:
    """Why a run has no result, where that lies in the run.

    Args:
        last: the last line that the process printed.

    Raises:
        LoraOverError: it does not.
    """
    found = read_failure(folder)
    if found is not None and found.is_of_method:
        return FAILURES[found.kind]
    reason = last if found is None else found.message
    raise LoraOverError(f"{folder}: loraover train ended without a result: {reason}")


def _fold_error(adapter: Path) -> float | None:
    """Of the stored matrices against the float64 contraction of their cores."""
    if not (adapter / META_FILE).is_file():
        return None
    source = read_checkpoint(adapter)
    worst = 0.0
    with open_exact(source) as exact:
        for key in exact.plain.keys:
            found = exact.tensor(key)
            if found.site is not None and found.value.any():
                error = (exact.plain.read(key).double() - found.value).norm() / found.value.norm()
                worst = max(worst, float(error))
    return worst
