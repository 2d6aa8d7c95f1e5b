"""`loraover train` in two processes on a CPU: LoRA and LoRA-Over under each engine, and continued in one process."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from loraover.checkpoint.files import TENSORS_FILE
from loraover.checkpoint.tensor_file import open_tensors
from loraover.training.run_result import read_run

from benchmarks.shown import table_of
from support.parallel_command import called
from support.processes import TESTS, TORCHRUN, launched
from support.tiny_hub import save_llama, write_recipe
from support.trained_run import losses

STEPS = 12
METHODS = ("lora", "lora-over")
ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}
ROWS, RATE = 16, 1e-3
SCRIPT = TESTS / "support" / "parallel_resized.py"


def measure() -> Iterator[Table]:
    """Yield the table of engines."""
    table = table_of(
        "LoRA-Over beside LoRA in two processes, under each engine",
        *("", "loss off", "step / LoRA's", "keys, LoRA", "keys", "continued in one: loss off"),
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = save_llama(folder / "base", **SIZES)
        training = {
            "max_steps": STEPS,
            "save_steps": STEPS // 2,
            "learning_rate": RATE,
            "per_device_train_batch_size": ROWS,
        }
        data = {"train_examples": 2 * ROWS * STEPS}
        recipe, twice = folder / "recipe.yaml", training | {"gradient_accumulation_steps": 2}
        write_recipe(recipe, base, data=data, training=twice)
        alone = called(recipe, "-o", folder / "alone", "--set", "evaluation.exact_match=false", "--method", METHODS[1])
        assert alone["code"] == 0, alone["error"]
        write_recipe(recipe, base, data=data, training=training)
        launched(TORCHRUN, SCRIPT, recipe, *(f"{kind}-{method}" for kind in ENGINES for method in METHODS))
        for kind in ENGINES:
            plain, over = (folder / f"{kind}-{method}" for method in METHODS)
            expected, found, ratio = losses(folder / "alone"), losses(over), _step_s(over) / _step_s(plain)
            keys = [f"{_keys(run)}" for run in (plain, over)]
            (over / "run.json").unlink()
            for left in (over / "adapter", over / "trainer" / f"checkpoint-{STEPS}"):
                shutil.rmtree(left)
            launched((*TORCHRUN[:-1], "1"), SCRIPT, recipe, over.name)
            row = (_off(found, expected), f"{ratio:.2f}", *keys, _off(losses(over), expected))
            table.add_row(kind, *row)
    yield table


def _step_s(run: Path) -> float:
    """Seconds of a step, with its part of both checkpoints."""
    result = read_run(run)
    return result.train_seconds / result.timed_steps


def _keys(run: Path) -> int:
    with open_tensors(run / "adapter" / TENSORS_FILE) as file:
        return len(file.keys)


def _off(found: Mapping[int, float], expected: Mapping[int, float]) -> str:
    """Largest relative difference of a loss."""
    return f"{max(abs(found[step] / loss - 1) for step, loss in expected.items()):.1e}"
