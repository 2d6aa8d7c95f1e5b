"""`loraover train` in the one process that torchrun starts for one GPU: under DeepSpeed, under FSDP2, and without.

The runs follow one another in this process. Each engine trains a plain LoRA and LoRA-Over; the losses of its last step
should be those of the run without an engine, up to the rounding of the data type.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table

from loraover.common.command_line import quiet_libraries
from loraover.training.run import train
from loraover.training.trial import StepClock
from loraover_serve.vllm.request import LOOPBACK
from loraover_serve.vllm.server import free_port

from benchmarks.clock import find_device
from benchmarks.gpu.checkpoints import make_base
from benchmarks.planning import STEPS, Shape, recipe_of
from benchmarks.shown import Numbers
from support.parallel_fsdp_trainer import allow_fsdp_on_cpus
from support.trained_run import losses

ALONE = "no launcher"
METHODS = ("lora", "lora-over")
LOSS_WITHIN = 0.01
"""Largest difference of the last loss from that without an engine, as a share of it: bfloat16 has 8 bits."""


def measure(size: str, length: int, engines: Sequence[str]) -> Iterator[Table | Numbers]:
    """Train a few steps under each engine.

    Args:
        size: Size of the model, a key of `SIZES`.
        length: Tokens of a row; a step has one.
        engines: Names of engines, as `distributed.engine` takes them.

    Raises:
        RuntimeError: An engine's last loss differs.
    """
    quiet_libraries()
    device = find_device()
    table = Table(
        box=SIMPLE,
        title=f"`loraover train`, {size}, 1 x {length} tokens, r = 16, bf16, one process, on {device.type}",
        caption=f"Seconds: median of {STEPS} steps without the first. Loss: of step {STEPS}.",
    )
    for column in ("engine", "LoRA", "LoRA-Over", "LoRA-Over / LoRA", "loss of LoRA", "loss of LoRA-Over"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    found: dict[str, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        make_base(size, base)
        for engine in (ALONE, *engines):
            if engine != ALONE:
                _as_launched(device)
            found[engine] = {method: _run(engine, method, length, base) for method in METHODS}
            (plain_s, plain), (over_s, over) = found[engine].values()
            table.add_row(
                *(engine, f"{plain_s:.3f} s", f"{over_s:.3f} s", f"{over_s / plain_s:.3f}"),
                *(f"{plain:.4f}", f"{over:.4f}"),
            )
    yield table
    yield {"engines": found}
    for engine, runs in found.items():
        for method, (_, loss) in runs.items():
            expected = found[ALONE][method][1]
            if abs(loss - expected) > LOSS_WITHIN * expected:
                raise RuntimeError(f"{engine}, {method}: the last loss is {loss:.4f}, expected {expected:.4f}")


def _as_launched(device: torch.device) -> None:
    """Give this process the environment that torchrun gives to a single one."""
    if "RANK" not in os.environ:
        os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), "0") | {"WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port(LOOPBACK))}
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"


def _run(engine: str, method: str, length: int, base: Path) -> tuple[float, float]:
    """Train, and return the seconds of a step and the loss of the last one."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    plain_init = PartialState.__init__
    if engine == "fsdp2" and not torch.accelerator.is_available():
        allow_fsdp_on_cpus()
    try:
        folder, clock = base.with_name(f"{engine}-{method}"), StepClock()
        settings: dict[str, Any] = {"bf16": True, "gradient_checkpointing": True, "logging_steps": 1}
        recipe = recipe_of(Shape(method, 1, length, 16), base.parent, str(base), **settings)
        if engine != ALONE:
            recipe = recipe.model_copy(update={"distributed": recipe.distributed.model_copy(update={"engine": engine})})
        train(recipe, folder, report=clock)
    finally:
        PartialState.__init__ = plain_init
    return clock.step_seconds, losses(folder)[STEPS]
