"""The finished runs of a study: `runs.jsonl`, one line a run, sorted by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field

from loraover.common.atomic_output import publish_text
from loraover.common.errors import ConfigError, OutputError
from loraover.common.file_lock import hold_lock
from loraover.common.strict_json import read_json_lines
from loraover_lab.study.grid import Run
from loraover_lab.study.outcome import RunOutcome, another_recipe, digest
from loraover_lab.study.request import StudyRequest

KEPT_FILE = "runs.jsonl"


class KeptRun(RunOutcome):
    """An outcome with the name of its run."""

    run: str = Field(
        pattern="^[^/]+/[^/]+/lr-[^/]+/seed-[0-9]+$",
        description="TASK/METHOD/lr-RATE/seed-N, the run's folder in the study's folder `runs`.",
    )


def finished(grid: Sequence[Run], folder: Path, reuse: Sequence[Path] = ()) -> dict[Run, RunOutcome]:
    """Read the outcomes of all runs that are finished.

    Args:
        grid: The runs.
        folder: The study's folder.
        reuse: Folders of other studies, whose runs with the same recipe count as runs of this one.

    Raises:
        ConfigError: A run of this study was begun with another recipe, or a study to reuse has no finished run.
    """
    own = {kept.run: kept for kept in read_kept(folder)}
    others = {kept.recipe: kept for other in reversed(reuse) for kept in _other(other)}
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


def _other(folder: Path) -> list[KeptRun]:
    if not (found := read_kept(folder)):
        reuse = StudyRequest.named("reuse")
        raise ConfigError(f"{reuse} {folder}: expected the folder of a study with finished runs, found no {KEPT_FILE}.")
    return found


def keep(folder: Path, outcomes: Mapping[Run, RunOutcome]) -> None:
    """Add finished runs to those that a study's folder keeps; several processes may do so at once.

    Args:
        folder: The study's folder, which is made if it is missing.
        outcomes: Outcomes of the runs.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with hold_lock(folder / f".{KEPT_FILE}.lock", wait=True):
            kept = {one.run: one for one in read_kept(folder)}
            kept |= {run.name: KeptRun(**(dict(outcome) | {"run": run.name})) for run, outcome in outcomes.items()}
            lines = [one.model_dump_json(exclude_defaults=True) + "\n" for _, one in sorted(kept.items())]
            publish_text(folder / KEPT_FILE, "".join(lines))
    except OSError as error:
        raise OutputError(f"{folder / KEPT_FILE} cannot be written: {error.strerror}.") from error
