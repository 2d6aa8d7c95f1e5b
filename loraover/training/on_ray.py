"""A run on Ray Train, whose workers are the processes of the run."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal

from loraover.common.errors import ConfigError, LoraOverError, ProcessError, own_kind
from loraover.common.extras import install
from loraover.common.ranks import launched
from loraover.common.reporter import Reporter
from loraover.common.request import as_written
from loraover.training.recipe import Recipe
from loraover.training.run.folder import check_claim
from loraover.training.run.train import train
from loraover.training.run_result import RunResult, read_run

RESTARTS = 3
"""How often Ray starts the workers again when one of them has died."""

REFUSED, LINES = "refused.json", "lines.txt"
"""Files through which the workers tell why a request cannot be used, and how far they are."""

LOOK_S = 0.5
"""Seconds between two looks at these lines."""

WIDTH = 1000
"""Width of the console, so large that no line is broken."""


def train_on_ray(
    recipe: Recipe,
    output: Path,
    address: str,
    workers: int,
    *,
    resume: bool | Literal["auto"],
    report: Reporter,
    command: str,
    record: bool,
) -> RunResult:
    """Train a recipe as `train` does, in the workers of a Ray cluster, each with one GPU if the cluster has GPUs.

    A worker that dies ends all of them; Ray starts them again, and they continue from the last complete checkpoint.

    Args:
        output: The run's folder, on a disk that all machines share.
        address: Address of the cluster, or "local" for one on this machine.
        workers: Number of workers.
        resume, report, command, record: As for `train`.

    Raises:
        ConfigError: Ray is not installed, or the cluster has too few CPUs or GPUs; and what `train` raises.
        ProcessError: A worker has died, or failed for another reason, more than `RESTARTS` times.
    """
    if resume != "auto":
        check_claim(output, resume=resume)
    with ray_cluster(address) as ray:
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer

        there = ray.cluster_resources()
        kind = "GPU" if there.get("GPU") else "CPU"
        if workers > there.get(kind, 0):
            raise ConfigError(f"{as_written('workers', str(workers))}: the cluster has {there.get(kind, 0):g} {kind}s.")
        report.line(f"run of {workers} worker(s) on Ray, each with one {kind}")
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent.absolute()) as scratch:
            work = {"recipe": recipe.model_dump(mode="json"), "output": str(output), "scratch": scratch}
            work |= {"options": {"command": command, "record": record}, "folder": str(Path.cwd())}
            trainer = TorchTrainer(
                _take_part,
                train_loop_config=work,
                scaling_config=ScalingConfig(num_workers=workers, use_gpu=kind == "GPU"),
                run_config=RunConfig(storage_path=scratch, failure_config=FailureConfig(max_failures=RESTARTS)),
            )
            with _followed(Path(scratch) / LINES, report):
                try:
                    trainer.fit()
                except TrainingFailedError as error:
                    failed = f"Ray's workers have failed {RESTARTS + 1} times, at last with: {error}"
                    raise ProcessError(failed) from error
            if (refused := Path(scratch) / REFUSED).exists():
                says = json.loads(refused.read_text())
                kinds = {one.__name__: one for one in LoraOverError.__subclasses__()}
                raise kinds.get(says["kind"], LoraOverError)(says["message"])
    return read_run(output)


@contextmanager
def _followed(file: Path, report: Reporter) -> Iterator[None]:
    """Report the lines that a worker appends to a file while a block runs."""
    ended = Event()

    def follow() -> None:
        shown = 0
        while True:
            is_over = ended.is_set()
            lines = file.read_text().split("\n")[:-1] if file.exists() else []
            for line in lines[shown:]:
                report.line(line)
            shown = len(lines)
            if is_over:
                return
            ended.wait(LOOK_S)

    follower = Thread(target=follow)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


def _take_part(work: Mapping[str, Any]) -> None:
    """Train as one worker; a refusal is left in a file, since Ray would take it for a reason to start again."""
    from rich.console import Console

    from loraover.reporting.reporter import ConsoleReporter

    os.chdir(work["folder"])  # where the recipe's paths lead from
    recipe, scratch = Recipe.model_validate(work["recipe"]), Path(work["scratch"])
    with (scratch / LINES).open("a", buffering=1) as lines:
        report = ConsoleReporter(Console(file=lines, width=WIDTH))
        try:
            train(recipe, work["output"], resume="auto", report=report, **work["options"])
        except ProcessError:
            raise
        except LoraOverError as error:
            says = json.dumps({"kind": own_kind(error).__name__, "message": str(error)})
            launched().write((scratch / REFUSED).write_text, says)


@contextmanager
def ray_cluster(address: str) -> Iterator[Any]:
    """Connect to a Ray cluster, or start a "local" one, for a block, and yield the module `ray`."""
    try:
        import ray as imported
    except ImportError as error:
        raise ConfigError(f"{as_written('ray')} needs Ray: {install('ray')}.") from error
    ray: Any = imported
    where = None if address == "local" else address
    try:
        ray.init(address=where, log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"{as_written('ray', address)}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
