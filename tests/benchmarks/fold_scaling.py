"""Time of a fold against the size of the adapter, in the shapes of Llama models from 0.1B to 70B parameters.

Beside it is the physical limit: reading and hashing the checkpoint, writing as many bytes as the adapter has, and
waiting until the disk has them. One process for each model alternates folds and limits, so their ratio is one of pairs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from shutil import rmtree
from statistics import median
from typing import NamedTuple

from rich.table import Table

from loraover.checkpoint.files import TENSORS_FILE

from benchmarks.folding import RANK, limit_here, write_synthetic_checkpoint
from benchmarks.intervals import median_interval, median_ratio
from benchmarks.processes import in_child
from benchmarks.shapes import MODELS
from benchmarks.shown import Plot, Point, Shown, draw_curves, table_of

LARGE_BYTES, FEW = 2**29, 2
"""From this size of the adapter on, a model is folded only that many times."""


class Times(NamedTuple):
    """Seconds of folds and of their limits, in pairs."""

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
        started = time.perf_counter()
        fold_checkpoint(checkpoint, output)
        fold = time.perf_counter() - started
        rmtree(output)
        limit = limit_here(checkpoint, output)
        output.unlink()
        if number >= 0:
            folds.append(fold)
            limits.append(limit)
    return Times(size, folds, limits)


def measure(repeats: int = 5) -> Iterator[Shown]:
    """Time the folds of adapters of growing size, each beside its limit."""
    found = {}
    for model in MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint, shapes = Path(scratch) / "checkpoint", MODELS[model]
            # Another process than that of the folds: they shall not start with its memory.
            in_child(write_synthetic_checkpoint, checkpoint, "mpo", shapes.layers, shapes.linears)
            found[model] = in_child(time_model, checkpoint, repeats)
    yield time_table(found)
    yield plot_of(found)


def time_table(found: dict[str, Times]) -> Table:
    """Show seconds and ratios for every model."""
    table = table_of(
        f"Fold of adapters by size: cores of mpo, r = {RANK}, all linear layers",
        *("shapes of", "matrices", "parameters", "folds", "fold", "limit", "fold / limit [95 %]"),
        caption="Limit: reading, hashing, writing and syncing the same bytes.",
    )
    for model, times in found.items():
        table.add_row(
            model,
            f"{2 * MODELS[model].layers * len(MODELS[model].linears):,}",
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
        name: [Point(times.parameters / 1e6, *median_interval(getattr(times, field))[:3]) for times in found.values()]
        for name, field in (("fold and certify", "folds"), ("read, hash and write", "limits"))
    }
    svg = draw_curves(
        curves,
        x="parameters of the adapter, millions",
        y="seconds",
        ticks=[times.parameters / 1e6 for times in found.values()],
        names=".0f",
    )
    models = list(found)
    return Plot(
        "fold-time",
        "Seconds of a fold, and of reading, hashing and writing its bytes, against the parameters of the adapter, "
        f"from {models[0]} to {models[-1]}. The numbers are in the table above.",
        svg,
    )
