"""Time of a fold against the size of the adapter, in the shapes of Llama models from 0.1B to 70B parameters.

Beside it is the physical limit: reading and hashing the checkpoint, writing as many bytes as the adapter has, and
waiting until the disk has them. One process for each model alternates folds and limits, so their ratio is one of pairs.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from shutil import rmtree
from statistics import median
from typing import Any, NamedTuple

import click
from rich.box import SIMPLE
from rich.table import Table

from loraover.checkpoint.checkpoint import CORES_FILE
from loraover.checkpoint.peft_adapter import TENSORS_FILE

from benchmarks.folding import LLAMA_8B, RANK, Llama, write_synthetic_checkpoint
from benchmarks.intervals import median_interval, median_ratio
from benchmarks.shown import Plot, Point, Shown, draw_curves

MODELS = {
    "SmolLM2-135M": Llama(layers=30, hidden=576, values=192, intermediate=1536),
    "Llama-3.2-1B": Llama(layers=16, hidden=2048, values=512, intermediate=8192),
    "Llama-3.2-3B": Llama(layers=28, hidden=3072, values=1024, intermediate=8192),
    "Llama-3.1-8B": LLAMA_8B,
    "Llama-3.1-70B": Llama(layers=80, hidden=8192, values=1024, intermediate=28672),
}
LARGE_BYTES, FEW = 2**29, 2
"""From this size of the adapter on, a model is folded only that many times."""
BLOCK = 2**20


class Times(NamedTuple):
    """Seconds of folds and of their limits, in pairs.

    Args:
        adapter_bytes: Size of the adapter.
        folds: Seconds of each fold.
        limits: Seconds of the limit beside each fold.
    """

    adapter_bytes: int
    folds: Sequence[float]
    limits: Sequence[float]

    @property
    def parameters(self) -> int:
        """Number of float32 values in the adapter."""
        return self.adapter_bytes // 4


def time_model(checkpoint: Path, repeats: int) -> Times:
    """Fold a checkpoint and take the limit in turn, in this process, after imports and one fold that warms up."""
    from loraover_export import fold_checkpoint

    size = (checkpoint / TENSORS_FILE).stat().st_size
    repeats = FEW if size >= LARGE_BYTES else repeats
    output = checkpoint.with_name("output")
    folds, limits = [], []
    for number in range(-1 if size < LARGE_BYTES else 0, repeats):
        fold = _seconds(lambda: fold_checkpoint(checkpoint, output))
        rmtree(output)
        limit = _seconds(lambda: reach_limit(checkpoint, output))
        output.unlink()
        if number >= 0:
            folds.append(fold)
            limits.append(limit)
    return Times(size, folds, limits)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def reach_limit(checkpoint: Path, output: Path) -> None:
    """Read and hash a checkpoint's tensors, and write and sync as many bytes as the adapter has."""
    block = bytearray(BLOCK)
    with output.open("wb", buffering=0) as written:
        for name in (TENSORS_FILE, CORES_FILE):
            hashed = hashlib.sha256()
            with (checkpoint / name).open("rb", buffering=0) as file:
                while count := file.readinto(block):
                    hashed.update(memoryview(block)[:count])
                    if name == TENSORS_FILE:
                        written.write(memoryview(block)[:count])
        os.fsync(written.fileno())


def measure(repeats: int = 5) -> Iterator[Shown]:
    """Time the folds of adapters of growing size, each beside its limit."""
    found = {}
    for model in MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            _in_child(model, scratch, 0)  # another process than that of the folds: they shall not start with its memory
            found[model] = Times(*json.loads(_in_child(model, scratch, repeats)))
    yield table_of(found)
    yield plot_of(found)


def _in_child(model: str, folder: str, repeats: int) -> str:
    command = [sys.executable, "-m", "benchmarks.fold_scaling", model, folder, str(repeats)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def table_of(found: dict[str, Times]) -> Table:
    """Show seconds and ratios for every model."""
    table = Table(box=SIMPLE, title=f"Fold of adapters by size: cores of mpo, r = {RANK}, all linear layers")
    for column in ("shapes of", "matrices", "parameters", "folds", "fold", "read, hash, write", "ratio [95 %]"):
        table.add_column(column, justify="left" if column == "shapes of" else "right")
    for model, times in found.items():
        table.add_row(
            model,
            f"{MODELS[model].sites:,}",
            f"{times.parameters / 1e6:.1f} M",
            str(len(times.folds)),
            f"{median(times.folds):.2f} s",
            f"{median(times.limits):.2f} s",
            median_ratio(times.folds, times.limits).shown(),
        )
    return table


def plot_of(found: dict[str, Times]) -> Plot:
    """Draw the seconds against the number of parameters."""
    curves = {
        name: [Point(times.parameters / 1e6, *median_interval(getattr(times, field))) for times in found.values()]
        for name, field in (("fold and certify", "folds"), ("read, hash and write", "limits"))
    }
    svg = draw_curves(
        curves,
        x="parameters of the adapter, millions",
        y="seconds",
        ticks=[times.parameters / 1e6 for times in found.values()],
        names="{:.0f}",
    )
    models = list(found)
    return Plot(
        "fold-time",
        "Seconds of a fold, and of reading, hashing and writing its bytes, against the parameters of the adapter, "
        f"from {models[0]} to {models[-1]}. The numbers are in the table above.",
        svg,
    )


@click.command()
@click.argument("model", type=click.Choice(tuple(MODELS)))
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repeats", type=int)
def main(model: str, folder: Path, repeats: int) -> None:
    """Make a model's checkpoint in a folder, if repeats is 0; else fold it."""
    if repeats == 0:
        write_synthetic_checkpoint(folder / "checkpoint", MODELS[model])
    else:
        print(json.dumps(time_model(folder / "checkpoint", repeats)))


if __name__ == "__main__":
    main()
