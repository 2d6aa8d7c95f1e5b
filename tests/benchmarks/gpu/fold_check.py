"""`fold --check-error` of an adapter on all linear layers of a model with random weights, which lie on disk."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from loraover.common.command_line import quiet_libraries
from loraover.common.provenance import peak_bytes
from loraover_export import fold_checkpoint

from benchmarks.clock import find_device
from benchmarks.gpu.checkpoints import RANK, make_checkpoint
from benchmarks.shown import Numbers, table_of


def measure(size: str, dtypes: Sequence[str]) -> Iterator[Table | Numbers]:
    """Fold and check in each data type."""
    quiet_libraries()
    device = find_device()
    columns = ("computed in", "verdict", "seconds", "peak memory", "largest logit error", "allowed", "adapter moves")
    table = table_of(f"`fold --check-error`, {size}, r = {RANK}, on {device.type}", *columns, words=2)
    numbers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = make_checkpoint(size, Path(scratch))
        for dtype in dtypes:
            _forget_peak()
            started = time.perf_counter()
            options: dict[str, Any] = {"dtype": "bf16", "device": device.type, "compute_dtype": dtype}
            outputs = fold_checkpoint(checkpoint, Path(scratch) / dtype, check_error=True, **options).outputs
            taken, peak = time.perf_counter() - started, peak_bytes()
            assert outputs is not None  # which check_error asks for
            figures = (f"{value:.3g}" for value in (outputs.error.max_logit, outputs.bound, outputs.adapter_effect))
            table.add_row(dtype, outputs.verdict, f"{taken:.0f} s", f"{peak / 2**30:.1f} GiB", *figures)
            numbers[dtype] = {"verdict": outputs.verdict, "seconds": taken, "peak_bytes": peak}
            numbers[dtype] |= {"error": outputs.error.max_logit, "allowed": outputs.bound}
    yield table
    yield {"fold_check": numbers}
    if any(found["verdict"] == "failed" for found in numbers.values()):
        raise RuntimeError("a fold failed its check")


def _forget_peak() -> None:
    """Begin the measurement of peak memory anew, where that is the device's."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
