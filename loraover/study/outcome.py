"""One finished run of a study: `outcome.json`."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field

from loraover.adapter_dir import read_json
from loraover.checkpoint import META_FILE, read_checkpoint
from loraover.errors import ConfigError, LoraOverError
from loraover.exact import open_exact
from loraover.output import publish_file
from loraover.recipe import Recipe
from loraover.run_result import RUN_FILE, read_run
from loraover.train import HELD_OUT_FILE

OUTCOME_FILE = "outcome.json"
DIVERGED = "training diverged"


class Outcome(BaseModel):
    """What a study needs of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str = Field(description="SHA-256 of the recipe")
    failure: str | None = Field(None, description="why there is no loss; a run that diverged has failed for good")
    nats: list[float] = Field(default_factory=list, description="of each held-out completion")
    tokens: list[int] = Field(default_factory=list)
    step_seconds: float = 0.0
    peak_bytes: int = Field(0, description="of the process")
    trained_parameters: int = Field(0, description="numbers in the cores, and in the matrices without cores")
    served_parameters: int = Field(0, description="numbers in A and B")
    update_norm: float | None = None
    step_norm: float | None = Field(None, description="mean over the logged steps")
    fold_error: float | None = Field(None, description="largest relative Frobenius error of a stored A or B")


def execute(recipe: Recipe, folder: Path, threads: int) -> Outcome:
    """Train in a process of its own, or go on with a run that was cut off.

    Args:
        folder: of the run; its outcome is written there, and is what a second call returns.
        threads: for the process.
    Raises:
        LoraOverError: the run failed for another reason than that its loss diverged.
    """
    found = read_outcome(recipe, folder)
    if found is not None:
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    asked = folder.with_suffix(folder.suffix + ".yaml")
    publish_file(asked, lambda draft: draft.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)))
    command = [sys.executable, "-m", "loraover.cli", "train", str(asked), "-o", str(folder)]
    command += ["--resume"] if (folder / "recipe.yaml").is_file() else []
    with tempfile.TemporaryFile("w+") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            process.wait()  # the terminal has told it as well
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        said = log.read()
    outcome = _outcome(recipe, folder, said, process.returncode, usage.ru_maxrss * 1024)
    publish_file(folder / OUTCOME_FILE, lambda draft: draft.write_text(outcome.model_dump_json() + "\n"))
    return outcome


def read_outcome(recipe: Recipe, folder: Path) -> Outcome | None:
    """Of a run that is finished already.

    Raises:
        ConfigError: that run had another recipe.
    """
    if not (folder / OUTCOME_FILE).is_file():
        return None
    found = read_json(folder / OUTCOME_FILE, Outcome)
    if found.recipe != digest(recipe):
        raise ConfigError(f"{folder}: was run with another recipe than this study's; name a new folder.")
    return found


def digest(recipe: Recipe) -> str:
    """Of the keys that are not at their defaults, so that a new key leaves finished runs valid."""
    return hashlib.sha256(recipe.model_dump_json(exclude_defaults=True).encode()).hexdigest()


def _outcome(recipe: Recipe, folder: Path, said: str, code: int, peak: int) -> Outcome:
    if not (folder / RUN_FILE).is_file():
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
        if DIVERGED in said:
            return Outcome(recipe=digest(recipe), failure=DIVERGED, peak_bytes=peak)
        raise LoraOverError(f"{folder}: loraover train ended with code {code}: {last}")
    result = read_run(folder)
    scored = json.loads((folder / HELD_OUT_FILE).read_text())
    logged = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    norms = [row["loraover/step_norm"] for row in logged if "loraover/step_norm" in row]
    return Outcome(
        recipe=digest(recipe),
        nats=[nats for nats, _ in scored],
        tokens=[tokens for _, tokens in scored],
        step_seconds=result.train_seconds / result.steps,
        peak_bytes=peak,
        trained_parameters=result.lora_parameters + result.added_parameters,
        served_parameters=result.lora_parameters,
        update_norm=result.update_norm,
        step_norm=sum(norms) / len(norms) if norms else None,
        fold_error=_fold_error(folder / "adapter"),
    )


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
