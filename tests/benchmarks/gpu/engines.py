"""`loraover train` in the one process that torchrun starts for one GPU: under DeepSpeed, under FSDP2, and without.

The runs follow one another in this process. Each engine trains a plain LoRA and LoRA-Over; the losses of its last step
should be those of the run without an engine, up to the rounding of the data type.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from loraover.common.command_line import quiet_libraries
from loraover.training.run.train import train
from loraover.training.trial import StepClock
from loraover_serve.vllm.request import LOOPBACK
from loraover_serve.vllm.server import free_port

from benchmarks.clock import find_device
from benchmarks.gpu.checkpoints import make_base
from benchmarks.planning import STEPS, Shape, recipe_of
from benchmarks.shown import Numbers, table_of
from support.parallel_fsdp_trainer import allow_fsdp_on_cpus
from support.trained_run import losses

ALONE = "no launcher"
METHODS = ("lora", "lora-over")
WITHIN = 0.1
"""Largest difference of the last loss from that without an engine, as a share of what that run has learnt."""


class Steps(NamedTuple):
    """What a run took, and what it learnt: seconds of a step, and losses of the first and the last step."""

    seconds: float
    first: float
    last: float


def measure(size: str, length: int, rate: float, engines: Sequence[str]) -> Iterator[Table | Numbers]:
    """Train a few steps under each engine."""
    quiet_libraries()
    device = find_device()
    table = table_of(
        f"`loraover train`, {size}, 1 x {length} tokens, r = 16, bf16, one process, on {device.type}",
        *("engine", "LoRA", "LoRA-Over", "LoRA-Over / LoRA", "loss of LoRA", "loss of LoRA-Over"),
        caption=f"Seconds: median of {STEPS} steps without the first. Losses: of the first and the last step.",
    )
    found: dict[str, dict[str, Steps]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        make_base(size, base)
        for engine in (ALONE, *engines):
            if engine != ALONE:
                _as_launched(device)
            found[engine] = {method: _run(engine, method, length, rate, base) for method in METHODS}
            plain, over = found[engine].values()
            times = f"{plain.seconds:.3f} s", f"{over.seconds:.3f} s", f"{over.seconds / plain.seconds:.3f}"
            table.add_row(engine, *times, *(f"{run.first:.4f} to {run.last:.4f}" for run in (plain, over)))
    yield table
    yield {"engines": {engine: {name: run._asdict() for name, run in runs.items()} for engine, runs in found.items()}}
    for engine, runs in found.items():
        for method, run in runs.items():
            expected = found[ALONE][method]
            if not abs(run.last - expected.last) <= WITHIN * (expected.first - expected.last):
                raise RuntimeError(
                    f"{engine}, {method}: the loss went from {run.first:.4f} to {run.last:.4f}, "
                    f"expected {expected.first:.4f} to {expected.last:.4f}"
                )


def _as_launched(device: torch.device) -> None:
    """Give this process the environment that torchrun gives to a single one."""
    if "RANK" not in os.environ:
        os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), "0") | {"WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port(LOOPBACK))}
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"


def _run(engine: str, method: str, length: int, rate: float, base: Path) -> Steps:
    """Train in a new folder beside the base model."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    plain_init = PartialState.__init__
    if engine == "fsdp2" and not torch.accelerator.is_available():
        allow_fsdp_on_cpus()
    try:
        folder, clock = base.with_name(f"{engine}-{method}"), StepClock()
        settings: dict[str, Any] = {
            "bf16": True,
            "gradient_checkpointing": True,
            "logging_steps": 1,
            "learning_rate": rate,
        }
        recipe = recipe_of(Shape(method, 1, length, 16), base.parent, str(base), **settings)
        if engine != ALONE:
            recipe = recipe.model_copy(update={"distributed": recipe.distributed.model_copy(update={"engine": engine})})
        train(recipe, folder, report=clock)
    finally:
        PartialState.__init__ = plain_init
    return Steps(clock.step_seconds, losses(folder)[1], losses(folder)[STEPS])
