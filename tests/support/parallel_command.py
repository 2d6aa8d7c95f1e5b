"""A script for torchrun: `loraover train` in two processes, under each engine, continued, and refused.

    torchrun --standalone --nproc-per-node 2 support/parallel_command.py FOLDER

FOLDER holds `recipe.yaml`, and in `alone` a run of it that one process has left after `HALTED` steps. Each process
leaves what it saw in FOLDER/<rank>.json. In the last run, rank 1 stops answering.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from accelerate import PartialState

from loraover.cli import cli
from loraover.common.command_line import run
from loraover.training.run import build
from loraover.training.run.trainer import TrainingProgress

from support.parallel_fsdp_trainer import allow_fsdp_on_cpus

STEPS, HALTED = 4, 2
PATIENCE_S = 4.0
LAUNCH = Path(__file__).parents[2] / "docs" / "examples" / "launch"
ALONE: dict[str, list[str]] = {
    "lora-over": [],
    "loraplus": ["--set", "training.loraplus_lr_ratio=4"],
    "ragged": ["--set", "data.train_examples=13"],
    "soma": ["--method", "soma"],
    "lorasc": ["--method", "lorasc"],
    "tensorguide": ["--method", "tensorguide", "--set", "tensorguide.tt_rank=2"],
}
"""Words of a run in one process, which runs in two are compared with, by the end of their names."""


def halves(*words: object) -> list[str]:
    """A command whose step is shared by two processes, as one process takes it alone."""
    return ["--set", "training.gradient_accumulation_steps=1", *map(str, words)]


def engine(name: str) -> list[str]:
    return ["--set", f"distributed.engine={name}", "--set", "evaluation.exact_match=false"]


RUNS: dict[str, list[str]] = {
    "ddp": halves(),
    "zero2": halves(*engine("zero2"), "--set", f"distributed.config={LAUNCH / 'zero2.json'}"),
    "zero3": halves(*engine("zero3"), "--set", f"distributed.config={LAUNCH / 'zero3.json'}"),
    "fsdp2": halves(*engine("fsdp2")),
    "ddp-ragged": halves(*ALONE["ragged"]),
    "zero3-loraplus": halves(*engine("zero3"), *ALONE["loraplus"]),
    "fsdp2-loraplus": halves(*engine("fsdp2"), *ALONE["loraplus"]),
    **{f"ddp-{method}": halves(*ALONE[method]) for method in ("soma", "lorasc", "tensorguide")},
}
REFUSED: dict[str, list[str]] = {
    "federated": ["--method", "federated", "--set", "training.bf16=false"],
    "value": ["--set", "training.optim=adamx"],
    "uneven": halves("--set", "distributed.processes=3"),
    "cut": ["--set", "distributed.engine=zero3"],
    "beside": ["--method", "soma", "--set", "distributed.engine=zero2"],
}


def called(*words: object) -> dict[str, Any]:
    """Exit code and output of `loraover train` in this process."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as error:
        code = run(cli, ["train", *map(str, words)])
    return {"code": code, "out": out.getvalue(), "error": error.getvalue()}


def halt(self: TrainingProgress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    """Stop this process for good, as a machine that hangs does."""
    if state.global_step == HALTED:
        os.kill(os.getpid(), signal.SIGSTOP)


def main(folder: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    rank, recipe = int(os.environ["RANK"]), folder / "recipe.yaml"
    found = {name: called(recipe, "-o", folder / name, *words) for name, words in REFUSED.items()}
    found["apart"] = called(folder / f"only-{rank}.yaml", "-o", folder / "apart")
    plain, load = PartialState.__init__, build._load_base
    are_cut: list[bool] = []

    def noting(*places: Any) -> Any:
        model: Any = load(*places)
        are_cut.append(not any(parameter.numel() for parameter in model.parameters()))
        return model

    build._load_base = noting  # type: ignore[assignment]
    for name, words in RUNS.items():
        PartialState.__init__ = plain
        if name.startswith("fsdp2"):
            allow_fsdp_on_cpus()
        found[name] = called(recipe, "-o", folder / name, *words) | {"is_cut": are_cut[-1:]}
    PartialState.__init__ = plain
    if rank == 0:  # killed between the last step and the end
        left = shutil.copytree(folder / "zero3", folder / "unfinished", ignore=shutil.ignore_patterns("run.json"))
        shutil.rmtree(left / "adapter")
    found["unfinished"] = called(recipe, "-o", folder / "unfinished", *RUNS["zero3"], "--resume")
    found["dpo"] = called(folder / "dpo.yaml", "-o", folder / "dpo", *engine("zero2"))
    found["again"] = called(recipe, "-o", folder / "ddp", *RUNS["ddp"], "--resume", "auto")
    found["others"] = called(recipe, "-o", folder / "alone", "--resume", "auto")
    (folder / f"{rank}.json").write_text(json.dumps(found))
    if rank == 1:
        (folder / "1.pid").write_text(str(os.getpid()))
        TrainingProgress.on_step_end = halt  # type: ignore[method-assign]
    began = time.monotonic()
    found["hung"] = called(recipe, "-o", folder / "hung", *halves("--set", f"training.ddp_timeout={PATIENCE_S}"))
    found["hung"]["seconds"] = time.monotonic() - began
    (folder / f"{rank}.json").write_text(json.dumps(found))
    os.kill(int((folder / "1.pid").read_text()), signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
