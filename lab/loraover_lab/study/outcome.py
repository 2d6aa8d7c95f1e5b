"""Run of a study: trained in a process, and its outcome read from the files that the process left.

Outcomes are kept in the study's `runs.jsonl`, one line a run, sorted by its name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from pydantic import Field, model_validator

from loraover.checkpoint.checkpoint import read_checkpoint
from loraover.checkpoint.files import META_FILE
from loraover.common.arrays import as_tensor
from loraover.common.atomic_output import publish_text
from loraover.common.errors import ConfigError, DataError, LoraOverError, OutputError
from loraover.common.file_lock import hold_lock
from loraover.common.strict_json import StrictModel, read_json_lines
from loraover.data.formats import later_turn
from loraover.data.sources import BUILT_IN
from loraover.training.recipe import Recipe, load_recipe
from loraover.training.rows.data import load_held_out
from loraover.training.run.failure import FAILURE_FILE, read_failure
from loraover.training.run.folder import HELD_OUT_FILE, RECIPE_FILE, read_digests
from loraover.training.run.log import METRICS_FILE
from loraover.training.run_result import RUN_FILE, read_run
from loraover_lab.study.grid import FEWEST_EXAMPLES, Run
from loraover_lab.study.request import StudyRequest

DIVERGED, OUT_OF_MEMORY = "training diverged", "out of memory"
FAILURES = {"diverged": DIVERGED, "out_of_memory": OUT_OF_MEMORY}
"""Words for the kinds of failure that are due to the method."""
DECIMALS = 6
"""Digits of nats that are kept; a model in float32 has no more."""


class RunOutcome(StrictModel):
    """Results of a run that a study needs."""

    recipe: str = Field(description="SHA-256 of the recipe.")
    failure: str | None = Field(None, description="Reason why there is no loss; None if there is one.")
    nats: list[float] = Field(default_factory=list, description="Negative log-likelihood of each held-out completion.")
    tokens: list[int] = Field(default_factory=list, description="Tokens of each held-out completion.")
    step_seconds: float | None = Field(
        None, description="Seconds of an optimizer step; None: the process that ended the run took no step."
    )
    peak_bytes: int | None = Field(
        None, description="Largest memory in bytes: PyTorch's on a CUDA device, else the process's."
    )
    worker: str | None = Field(None, description="Worker of the Ray cluster that trained; None: no Ray.")
    hardware: str | None = Field(None, description="Machine that trained.")
    trained_parameters: int = Field(0, description="Numbers in the cores, and in the matrices without cores.")
    served_parameters: int = Field(0, description="Numbers in A and B.")
    served_rank: int | None = Field(None, description="Largest rank of a module as served; None: not known.")
    served_bytes: int | None = Field(None, description="Bytes of A and B as served; None: not known.")
    update_norm: float | None = Field(None, description="Frobenius norm of the change of scaling * B A.")
    step_norm: float | None = Field(None, description="Norm of the change of B A in one step, mean over logged steps.")
    fold_error: float | None = Field(None, description="Largest relative Frobenius error of a stored A or B.")
    score: float | None = Field(
        None,
        description="Right answers to the held-out rows in per cent, or the score of the study's benchmark; None: not "
        "measured.",
    )
    train_rows: str | None = Field(None, description="SHA-256 of the training rows; None: not known.")
    test_rows: str | None = Field(None, description="SHA-256 of the held-out rows; None: not known.")
    model_revision: str | None = Field(
        None, description="Commit of the base model on the hub; None: a folder, or not known."
    )
    started_from: str | None = Field(
        None,
        description="SHA-256 of the adapters that A and B started from, and their weights; None: none, or not known.",
    )

    @model_validator(mode="after")
    def _are_pairs(self) -> RunOutcome:
        if len(self.nats) != len(self.tokens):
            raise ValueError(f"{len(self.nats)} nats and {len(self.tokens)} tokens, expected equal numbers")
        return self


def execute(recipe: Recipe, folder: Path, threads: int) -> RunOutcome:
    """Train in a new process, or continue a run that was stopped; a finished run's outcome is read from its folder.

    Raises:
        ConfigError: The run was begun with another recipe.
        DataError: The held-out data cannot be read, or hold several turns of one conversation.
        OutputError: The folder cannot be made.
        LoraOverError: The run failed for another reason than its rate or its size.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder.parent} cannot be made: {error.strerror}.") from error
    # A process that inherits the lock's descriptor holds it too. So a study waits for a training process whose study
    # was killed, and two studies of one folder take turns.
    with hold_lock(folder.with_suffix(folder.suffix + ".lock"), wait=True) as lock:
        begun = any((folder / name).is_file() for name in (RECIPE_FILE, FAILURE_FILE))
        if begun and digest(load_recipe(str(_asked(folder)))) != digest(recipe):
            raise another_recipe(folder)
        failure, last = read_failure(folder), ""
        has_ended = (folder / RUN_FILE).is_file() or (failure is not None and failure.is_of_method)
        if not has_ended:  # after failures for other reasons than the rate or the size, a run is tried again
            check_held_out(recipe)
            last = _train(recipe, folder, threads, lock)
        return _outcome(recipe, folder, last)


def check_held_out(recipe: Recipe) -> int:
    """Count the held-out examples of a run, and check that a study can choose and compare by them.

    A study chooses rates on one half of the examples and compares methods on the other half, and its intervals take
    examples to be independent. Turns of one conversation would lie in both halves.
    """
    data = recipe.data
    if data.train == BUILT_IN and data.test is None:
        return min(recipe.evaluation.examples, data.test_examples or recipe.evaluation.examples)
    held_out, name = load_held_out(recipe), data.test or data.name
    count = 0 if held_out is None else len(held_out.rows)
    if held_out is None or count < FEWEST_EXAMPLES:
        raise DataError(
            f"{name}: has {count} held-out examples, and a study takes {FEWEST_EXAMPLES} or more. Name others with "
            "--set data.test=FILE."
        )
    later = later_turn(held_out.rows)
    if later is not None:
        raise DataError(
            f"{name}: held-out example {later + 1} is a later turn of the "
            f"conversation of example {later}. A study chooses rates on one half of the examples and compares methods "
            "on the other, so its held-out conversations may have only one turn of the assistant."
        )
    return count


def _asked(folder: Path) -> Path:
    """Path of the recipe that the study gave to the run; the run's copy names commits as well."""
    return folder.with_suffix(folder.suffix + ".yaml")


def another_recipe(folder: Path) -> ConfigError:
    """Return the error that a run's folder, or its kept outcome, belongs to another recipe."""
    return ConfigError(f"{folder}: holds a run with another recipe than this study's; name a new folder.")


def _train(recipe: Recipe, folder: Path, threads: int, lock: int) -> str:
    """Run `loraover train`, which leaves its result or its failure in the folder; return the last line it printed."""
    asked = _asked(folder)
    publish_text(asked, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    command = [sys.executable, "-m", "loraover.cli", "train", str(asked), "-o", str(folder)]
    has_begun = (folder / RECIPE_FILE).is_file()
    if recipe.can_resume and has_begun:
        command.append("--resume")
        (folder / FAILURE_FILE).unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
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
            process.wait()  # the terminal has sent it Ctrl-C too
            raise
        log.seek(0)
        last = next((line for line in reversed(log.read().splitlines()) if line.strip()), "it printed nothing")
    if process.returncode == -signal.SIGKILL:
        return "the process was killed, as Linux does when memory is short; try fewer runs at the same time"
    return last


def digest(recipe: Recipe) -> str:
    """SHA-256 of the keys that are not at their defaults, so that a new key leaves finished runs valid.

    Defaults of the decomposition count as well, since another default there would be another method.
    """
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    if recipe.method == "lora-over":
        values["decomposition"] = repr(recipe.over.make_decomposition())
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _outcome(recipe: Recipe, folder: Path, last: str) -> RunOutcome:
    if not (folder / RUN_FILE).is_file():
        failed = read_failure(folder)
        if failed is None or not failed.is_of_method:
            reason = last if failed is None else failed.message
            raise LoraOverError(f"{folder}: loraover train ended without a result: {reason}")
        return RunOutcome(recipe=digest(recipe), failure=FAILURES[failed.kind])
    result = read_run(folder)
    scored = json.loads((folder / HELD_OUT_FILE).read_text())
    if not all(math.isfinite(nats) for nats, _ in scored):
        return RunOutcome(recipe=digest(recipe), failure=DIVERGED)
    logged = (json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines())
    norms = [row["loraover/step_norm"] for row in logged if "loraover/step_norm" in row]
    rows, start = read_digests(folder), None
    if result.started_from is not None:
        content = [one.model_dump(exclude={"path"}) for one in result.started_from.sources]
        start = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    right = None if result.after is None else result.after.exact_match
    return RunOutcome(
        recipe=digest(recipe),
        nats=[round(nats, DECIMALS) for nats, _ in scored],
        tokens=[tokens for _, tokens in scored],
        step_seconds=result.train_seconds / result.timed_steps if result.timed_steps else None,
        peak_bytes=result.peak_bytes,
        hardware=result.hardware,
        trained_parameters=result.trained_parameters,
        served_parameters=result.lora_parameters,
        served_rank=result.served_rank,
        served_bytes=result.served_bytes,
        update_norm=result.update_norm,
        step_norm=sum(norms) / len(norms) if norms else None,
        fold_error=_fold_error(folder / "adapter"),
        score=None if right is None else 100 * right,
        train_rows=None if rows is None else rows.train,
        test_rows=None if rows is None else rows.test,
        model_revision=load_recipe(str(folder / RECIPE_FILE)).model_revision,
        started_from=start,
    )


def _fold_error(adapter: Path) -> float | None:
    """Largest relative error of the stored matrices against the float64 contraction of their cores."""
    if not (adapter / META_FILE).is_file():
        return None
    worst = 0.0
    with read_checkpoint(adapter).open() as exact:
        for key in exact.adapter.matrices:
            found = exact.tensor(key)
            if found.site is not None and found.value.any():
                error = (as_tensor(exact.stored(key)).double() - found.value).norm() / found.value.norm()
                worst = max(worst, float(error))
    return worst


KEPT_FILE = "runs.jsonl"


class KeptRun(RunOutcome):
    """An outcome with the name of its run."""

    run: str = Field(
        pattern="^[^/]+/[^/]+/lr-[^/]+/seed-[0-9]+$",
        description="TASK/METHOD/lr-RATE/seed-N, the run's folder in the study's folder `runs`.",
    )


def finished(grid: Sequence[Run], folder: Path, reuse: Sequence[Path] = ()) -> dict[Run, RunOutcome]:
    """Read the outcomes of all runs that are finished, in the study's folder or in those to reuse.

    Raises:
        ConfigError: A run of this study was begun with another recipe, or a study to reuse has no finished run.
    """
    own = {kept.run: kept for kept in read_kept(folder)}
    others: dict[str, RunOutcome] = {}
    for other in reversed(reuse):
        if not (theirs := read_kept(other)):
            asked = StudyRequest.named("reuse")
            raise ConfigError(
                f"{asked} {other}: expected the folder of a study with finished runs, found no {KEPT_FILE}."
            )
        others |= {kept.recipe: kept for kept in theirs}
    found: dict[Run, RunOutcome] = {}
    for run in grid:
        kept = own.get(run.name)
        if kept is not None and kept.recipe != digest(run.recipe):
            raise another_recipe(folder / run.folder)
        outcome = kept or others.get(digest(run.recipe))
        if outcome is not None:
            found[run] = outcome
    return found


def read_kept(folder: Path) -> list[KeptRun]:
    """Read the kept runs of a study's folder; an empty list if none has finished."""
    return read_json_lines(folder / KEPT_FILE, KeptRun) if (folder / KEPT_FILE).is_file() else []


def keep(folder: Path, outcomes: Mapping[Run, RunOutcome]) -> None:
    """Add finished runs to those that a study's folder keeps; several processes may do so at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with hold_lock(folder / f".{KEPT_FILE}.lock", wait=True):
            kept = {one.run: one for one in read_kept(folder)}
            kept |= {run.name: KeptRun(**(dict(outcome) | {"run": run.name})) for run, outcome in outcomes.items()}
            lines = [one.model_dump_json(exclude_defaults=True) + "\n" for _, one in sorted(kept.items())]
            publish_text(folder / KEPT_FILE, "".join(lines))
    except OSError as error:
        raise OutputError(f"{folder / KEPT_FILE} cannot be written: {error.strerror}.") from error
