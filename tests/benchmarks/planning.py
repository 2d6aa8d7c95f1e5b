"""What `loraover train --plan` predicts of SmolLM2-135M, and what the run then needs: peak memory and time of a step.

Prediction and run are processes of their own, in pairs. Times are processor time of one thread, which other work on the
machine changes less. Every row is longer than `max_length`, as the plan's number of tokens assumes.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from loraover.common.reporter import SILENT
from loraover.models.device import choose_device, prefers_bf16
from loraover.models.load import resolve_model
from loraover.training.recipe import Recipe
from loraover.training.run.train import train
from loraover.training.trial import RunNeeds, StepClock, try_steps

from benchmarks.processes import in_child
from benchmarks.shown import table_of


class Shape(NamedTuple):
    """Shape of a run."""

    method: str
    batch: int
    tokens: int
    rank: int
    precision: str = "fp32"


SHAPES = (Shape("lora", 2, 64, 8), Shape("lora", 4, 128, 16), Shape("lora-over", 2, 128, 4))
SHORT_SHAPES = (Shape("lora", 4, 128, 16, "bf16"), Shape("lora-over", 2, 128, 4, "bf16"))
"""Shapes for a machine on which runs compute in bfloat16 unless they are told otherwise."""
WITHIN = RunNeeds(0.25, 0.15)
"""Largest relative errors that the issue allows."""
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
STEPS, ROWS = 5, 64
WORDS = ("train", "adapter", "matrix", "learn", "small", "model", "token", "sum", "price", "apples", "week", "river")


def recipe_of(shape: Shape, folder: Path, model: str = MODEL, **training: Any) -> Recipe:
    """Write the rows of a run of `STEPS` steps without evaluation, and return its recipe."""
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
            "bf16": shape.precision == "bf16",
            **training,
        },
        "evaluation": {"examples": 0},
    }
    return Recipe.model_validate(content)


def predicted(shape: Shape) -> RunNeeds:
    """Try a few steps as a plan does."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        recipe = recipe_of(shape, Path(scratch))
        found = try_steps(recipe, resolve_model(recipe.model), SILENT, time.process_time)
    assert found is not None, "this machine bears a trial"
    return found


def measured(shape: Shape) -> RunNeeds:
    """Train."""
    torch.set_num_threads(1)
    clock = StepClock(time.process_time)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        peak = train(recipe_of(shape, folder), folder / "run", report=clock).peak_bytes
    return RunNeeds(clock.step_seconds, peak)


def measure() -> Iterator[Table]:
    """Compare what a plan predicts with what the run needs, for plain LoRA and LoRA-Over."""
    has_bf16 = prefers_bf16(choose_device())
    table = table_of(
        "SmolLM2-135M, all linear layers: predicted by --plan, and measured",
        *("run", "peak predicted", "measured", "off by", "step predicted", "measured", "off by"),
        caption=f"Wanted: memory within {WITHIN.peak_bytes:.0%}, time within {WITHIN.step_seconds:.0%}. "
        f"Processor time of one thread.{'' if has_bf16 else ' Not measured: bf16, which this processor lacks.'}",
    )
    for shape in (*SHAPES, *(SHORT_SHAPES if has_bf16 else ())):
        both = [in_child(work, shape) for work in (predicted, measured)]
        step, peak = (mine / real - 1 for mine, real in zip(*both, strict=True))
        table.add_row(
            f"{shape.method}, {shape.batch} x {shape.tokens} tokens, r = {shape.rank}, {shape.precision}",
            *(f"{needs.peak_bytes / 1e6:,.0f} MB" for needs in both),
            f"{peak:+.0%}",
            *(f"{needs.step_seconds:.2f} s" for needs in both),
            f"{step:+.0%}",
        )
    yield table
