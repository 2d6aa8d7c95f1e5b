"""`shrink` of an adapter with Llama-3.1-8B's shapes from rank 64 to 16, beside the dense SVD of one layer.

Each shrink runs in this process after one on a single layer, which imports and warms up. The dense SVD is of one of the
model's smallest layers, k_proj of 1024 x 4096, in float64; PEFT's way to a smaller rank takes one of every layer, in
float32. The ratio by count compares multiplications: some 6 (m + n) r^2 of the factors with some 14 m n min(m, n) of
the dense matrix.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from loraover.adapters.numerics.low_rank import dense_svd
from loraover_export import shrink_adapter

from benchmarks.intervals import median_interval
from benchmarks.shapes import MODELS
from benchmarks.shown import Shown, table_of
from support.plain_adapter import write_adapter

SHAPES = MODELS["Llama-3.1-8B"]
LINEARS = SHAPES.linears
RANK, KEPT, ROUNDS, DENSE_ROUNDS = 64, 16, 6, 1
DENSE = "self_attn.k_proj"


def make_adapter(folder: Path, layers: int) -> Path:
    """Write a random adapter in bfloat16, whose singular values fall by half over some ten ranks."""
    pairs = replace(SHAPES, layers=layers).pairs(RANK, torch.Generator().manual_seed(0), torch.bfloat16)
    decay = (2.0 ** (-torch.arange(RANK) / 10)).bfloat16()
    return write_adapter(folder, {path: (a, b * decay) for path, (a, b) in pairs.items()}, base_model_name_or_path=None)


def ratio_by_count() -> float:
    """Multiplications of dense SVDs of all layers over those of their factors."""
    dense = sum(14 * m * n * min(m, n) for m, n in LINEARS.values())
    return dense / sum(6 * (m + n) * RANK**2 for m, n in LINEARS.values())


def shrink_s(source: Path, output: Path) -> float:
    """Return the seconds of one shrink, its certificate and the sync to disk included."""
    started = time.perf_counter()
    certificate = shrink_adapter(source, output, rank=KEPT, dtype="bf16", force=True)
    seconds = time.perf_counter() - started
    if not certificate.passed or not all(module.truncation_error for module in certificate.modules):
        raise RuntimeError("the shrink did not pass, or left nothing out")
    return seconds


def dense_s() -> float:
    """Return the seconds of the truncation of one dense matrix."""
    matrix = torch.randn(*LINEARS[DENSE], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    started = time.perf_counter()
    dense_svd(matrix).truncate(KEPT)
    return time.perf_counter() - started


def measure() -> list[Shown]:
    """Return the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shrink_s(make_adapter(folder / "one layer", 1), folder / "out")
        source = make_adapter(folder / "adapter", SHAPES.layers)
        seconds = [shrink_s(source, folder / "out") for _ in range(ROUNDS)]
    modules = SHAPES.layers * len(LINEARS)
    dense = [dense_s() for _ in range(DENSE_ROUNDS)]
    m, n = LINEARS[DENSE]
    table = table_of(f"Shrink of {modules} modules in Llama-3.1-8B's shapes, r = {RANK} to {KEPT}", "", "")
    table.add_row("shrink, certify, write and sync", median_interval(seconds).shown(unit=" s"))
    table.add_row(f"dense SVD of one {m} x {n} layer", median_interval(dense).shown(unit=" s"))
    table.add_row("multiplications: dense SVDs of all layers / factors", f"{ratio_by_count():.0f} x")
    return [table]
