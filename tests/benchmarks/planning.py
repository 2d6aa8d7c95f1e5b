"""What `loraover train --plan` predicts of SmolLM2-135M, and what the run then needs: peak memory and time of a step.

Prediction and run are processes of their own, in pairs. Times are processor time of one thread, which other work on the
machine changes less. Every row is longer than `max_length`, as the plan's number of tokens assumes.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich.box import SIMPLE
from rich.table import Table

from loraover.common.command_line import quiet_libraries
from loraover.common.reporter import SILENT
from loraover.models.load import resolve_model
from loraover.training.recipe import Recipe
from loraover.training.run import train
from loraover.training.trial import RunNeeds, StepClock, try_steps


class Shape(NamedTuple):
    """Shape of a run.

    Args:
        method: Method of the recipe.
        batch: Rows of a micro-batch.
        tokens: Tokens of a row.
        rank: Rank of the LoRA.
    """

    method: str
    batch: int
    tokens: int
    rank: int


SHAPES = (Shape("lora", 2, 64, 8), Shape("lora", 4, 128, 16), Shape("lora-over", 2, 128, 4))
WITHIN = RunNeeds(0.25, 0.15)
"""Largest relative errors that the issue allows."""
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
STEPS, ROWS = 5, 64
WORDS = ("train", "adapter", "matrix", "learn", "small", "model", "token", "sum", "price", "apples", "week", "river")


def recipe_of(shape: Shape, folder: Path, model: str = MODEL, **training: Any) -> Recipe:
    """Write the rows of a run of `STEPS` steps without evaluation, and return its recipe.

    Args:
        shape: Shape of the run.
        folder: Folder for the rows.
        model: Base model.
        training: Settings of training in place of these.
    """
    draw = random.Random(0)
    answers = [" " + " ".join(draw.choices(WORDS, k=2 * shape.tokens)) for _ in range(ROWS)]
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "Say:", "completion": answer}) + "\n" for answer in answers))
    content: dict[str, Any] = {
        "model": model,
        "method": shape.method,
        "data": {"train": str(rows), "chat": False},
        "lora": {"r": shape.rank},
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": shape.batch,
            "max_length": shape.tokens,
            "learning_rate": 1e-4,
            "warmup_steps": 0,
            "bf16": False,
            **training,
        },
        "evaluation": {"examples": 0},
    }
    return Recipe.model_validate(content)


def needs_of(what: str, shape: Shape) -> RunNeeds:
    """Predict or measure in a fresh process, whose peak memory is that of this alone."""
    command = [sys.executable, "-m", "benchmarks.planning", what, *map(str, shape)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)
    return RunNeeds(*json.loads(done.stdout.splitlines()[-1]))


def measure() -> Iterator[Table]:
    """Compare what a plan predicts with what the run needs, for plain LoRA and LoRA-Over."""
    table = Table(
        box=SIMPLE,
        title="SmolLM2-135M in float32, all linear layers: predicted by --plan, and measured",
        caption=f"Wanted: memory within {WITHIN.peak_bytes:.0%}, time within {WITHIN.step_seconds:.0%}. "
        "Processor time of one thread.",
    )
    for column in ("run", "peak predicted", "measured", "off by", "step predicted", "measured", "off by"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for shape in SHAPES:
        predicted, measured = (needs_of(what, shape) for what in ("predicted", "measured"))
        step, peak = (mine / real - 1 for mine, real in zip(predicted, measured, strict=True))
        table.add_row(
            f"{shape.method}, {shape.batch} x {shape.tokens} tokens, r = {shape.rank}",
            *(f"{needs.peak_bytes / 1e6:,.0f} MB" for needs in (predicted, measured)),
            f"{peak:+.0%}",
            *(f"{needs.step_seconds:.2f} s" for needs in (predicted, measured)),
            f"{step:+.0%}",
        )
    yield table


@click.command()
@click.argument("what", type=click.Choice(("predicted", "measured")))
@click.argument("method")
@click.argument("batch", type=int)
@click.argument("tokens", type=int)
@click.argument("rank", type=int)
def main(what: str, **numbers: Any) -> None:
    """Try a few steps as a plan does, or train; print the seconds of a step and the peak memory in bytes."""
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        recipe = recipe_of(Shape(**numbers), Path(scratch))
        if what == "predicted":
            found = try_steps(recipe, resolve_model(recipe.model), SILENT, time.process_time)
        else:
            clock = StepClock(time.process_time)
            peak = train(recipe, Path(scratch) / "run", report=clock).peak_bytes
            found = RunNeeds(clock.step_seconds, peak)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
