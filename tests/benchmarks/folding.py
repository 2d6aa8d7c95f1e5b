"""Fold of a synthetic checkpoint with Llama-3.1-8B's shapes, beside the physical limit and PEFT's conversion.

The cores are what training leaves behind: every element has moved, so that each product of cores is rounded. A fold
runs in a separate process, which reports its seconds after imports and the peak memory that the fold adds. Another
process then takes the time of the work that no fold can avoid: it reads and hashes the checkpoint, writes as many bytes
as the adapter has, and waits until the disk has them. Folds and limits alternate, so their ratio is one of pairs.

PEFT's `convert_to_lora` is measured on one of the model's smallest linear layers, k_proj of
4096 x 1024; the figure for the model is that time multiplied by the number of its layers, which is an underestimate.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from loraover import LoraOverConfig
from loraover.checkpoint.files import CONFIG_FILE, CORES_FILE, META_FILE, TENSORS_FILE
from loraover.checkpoint.metadata import Meta, SiteRecord
from loraover.checkpoint.peft_adapter import site_key
from loraover.checkpoint.tensor_file import save_tensors, sha256_of
from loraover.common.provenance import host_peak_bytes
from loraover.overparam.decompositions import Decomposition, Eigen

from benchmarks.intervals import median_interval, median_ratio
from benchmarks.processes import in_child
from benchmarks.shapes import MODELS, Shapes
from benchmarks.shown import table_of

RANK, LAYERS, LINEARS = 16, MODELS["Llama-3.1-8B"].layers, MODELS["Llama-3.1-8B"].linears
DECOMPOSITIONS = ("mpo", "eigen")
MOVED = 3e-3
"""Standard deviation of what training adds to an element: a thousand steps of 1e-4, each up or down by chance."""


def write_synthetic_checkpoint(folder: Path, name: str, layers: int = LAYERS, linears: Shapes = LINEARS) -> None:
    """Write a checkpoint, r = 16, whose cores have been moved; by default of 448 matrices in Llama-3.1-8B's shapes."""
    config = LoraOverConfig(decomposition=name, seed=0)
    decomposition = config.make_decomposition()
    draw = torch.Generator().manual_seed(0)
    matrices: dict[str, Tensor] = {}
    cores: dict[str, Tensor] = {}
    sites = []
    for layer in range(layers):
        for linear, (out_features, in_features) in linears.items():
            for kind, (m, n) in (("lora_A", (RANK, in_features)), ("lora_B", (out_features, RANK))):
                site = SiteRecord(
                    name=f"model.layers.{layer}.{linear}.{kind}", m=m, n=n, step=0, joined=True, shares={}
                )
                made = trained_cores(decomposition, m, n, draw)
                cores |= {site.core_key(k): core[0] for k, core in enumerate(made)}
                matrices[site_key(site.name)] = decomposition.contract(made, m, n)[0].contiguous()
                sites.append(site)
    folder.mkdir()
    names = sorted({site.name.rpartition(".")[0] for site in sites})
    adapter_config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": names}
    (folder / CONFIG_FILE).write_text(json.dumps(adapter_config))
    save_tensors(matrices, folder / TENSORS_FILE)
    save_tensors(cores, folder / CORES_FILE)
    meta = Meta(
        base_model=None,
        step=0,
        config=config,
        core_dtype="float32",
        sites=sites,
        rounds=[],
        optimizer_steps=0,
        optimizer=None,
        world_size=1,
        versions={},
        sha256={name: sha256_of(folder / name) for name in (CONFIG_FILE, TENSORS_FILE, CORES_FILE)},
    )
    (folder / META_FILE).write_text(meta.sealed().model_dump_json())


def trained_cores(decomposition: Decomposition, m: int, n: int, draw: torch.Generator) -> list[Tensor]:
    """Cores of one random matrix, float32 (1, p, q): bases of `eigen` are random rotations, other cores have moved."""
    start = torch.randn(1, m, n, generator=draw, dtype=torch.float64) * 0.02
    centre = decomposition.centre(m, n)
    made = []
    for k, core in enumerate(decomposition.init(start, [draw])):
        if isinstance(decomposition, Eigen) and k != centre:
            made.append(_rotations(core.shape[1], core.shape[2], draw).float().contiguous())
        else:
            made.append((core + MOVED * torch.randn(core.shape, generator=draw, dtype=torch.float64)).float())
    return made


def _rotations(rows: int, size: int, draw: torch.Generator, drawn: int = 4) -> Tensor:
    """Orthogonal blocks below one another, (1, rows, size); `drawn` different ones, in random order."""
    blocks, _ = torch.linalg.qr(torch.randn(drawn, size, size, generator=draw, dtype=torch.float64))
    rotations: Tensor = blocks[torch.randint(drawn, (rows // size,), generator=draw)].reshape(1, rows, size)
    return rotations


class Fold(NamedTuple):
    """Seconds of a fold after imports, and the peak bytes that it adds."""

    seconds: float
    bytes: int


def fold_here(checkpoint: Path, output: Path) -> Fold:
    """Fold in this process."""
    import psutil

    from loraover_export import fold_checkpoint

    torch.ones(8, 8, dtype=torch.float64) @ torch.ones(8, 8, dtype=torch.float64)
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    certificate = fold_checkpoint(checkpoint, output)
    seconds = time.perf_counter() - started
    peak = host_peak_bytes()
    if not certificate.passed or not any(matrix.relative_error for matrix in certificate.matrices):
        raise RuntimeError("the fold did not pass, or nothing was rounded in it")
    return Fold(seconds, peak - before)


def limit_here(checkpoint: Path, output: Path) -> float:
    """Seconds of reading and hashing a checkpoint's tensors, and writing and syncing the adapter's bytes."""
    started = time.perf_counter()
    block = bytearray(2**20)
    with output.open("wb", buffering=0) as written:
        for name in (TENSORS_FILE, CORES_FILE):
            hashed = hashlib.sha256()
            with (checkpoint / name).open("rb", buffering=0) as file:
                while count := file.readinto(block):
                    hashed.update(memoryview(block)[:count])
                    if name == TENSORS_FILE:
                        written.write(memoryview(block)[:count])
        os.fsync(written.fileno())
    return time.perf_counter() - started


def convert_with_peft() -> float:
    """Seconds of PEFT's convert_to_lora on one 4096 x 1024 layer."""
    from peft import LoHaConfig, convert_to_lora, get_peft_model

    model = nn.Sequential(nn.Linear(4096, 1024, bias=False))
    adapted = get_peft_model(model, LoHaConfig(r=RANK, target_modules=["0"], init_weights=False))
    started = time.perf_counter()
    convert_to_lora(adapted, rank=RANK, progressbar=False)
    return time.perf_counter() - started


def measure_one(name: str, repeats: int, peft_seconds: float) -> dict[str, str]:
    """Return what a decomposition's fold costs, in words."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint = folder / "checkpoint"
        in_child(write_synthetic_checkpoint, checkpoint, name)
        adapter_bytes = (checkpoint / TENSORS_FILE).stat().st_size
        read_bytes = adapter_bytes + (checkpoint / CORES_FILE).stat().st_size
        folds, limit_seconds = [], []
        for i in range(repeats):
            folds.append(in_child(fold_here, checkpoint, folder / str(i)))
            limit_seconds.append(in_child(limit_here, checkpoint, folder / "limit"))
    fold_seconds = [fold.seconds for fold in folds]
    extra = [fold.bytes / adapter_bytes for fold in folds]
    return {
        "adapter": f"{adapter_bytes / 2**20:.0f} MiB",
        "adapter and cores": f"{read_bytes / 2**20:.0f} MiB",
        "fold and certify": median_interval(fold_seconds).shown(unit=" s"),
        "read, hash, write and sync": median_interval(limit_seconds).shown(unit=" s"),
        "fold / read, hash, write and sync": median_ratio(fold_seconds, limit_seconds).shown(unit=" x"),
        "extra memory / adapter": median_interval(extra).shown(unit=" x"),
        "PEFT convert_to_lora, one 4096 x 1024 layer": f"{peft_seconds:.2f} s",
        f"the same for {LAYERS * len(LINEARS)} layers / fold": median_ratio(
            [peft_seconds * LAYERS * len(LINEARS)] * repeats, fold_seconds
        ).shown(0, unit=" x"),
    }


def measure(repeats: int = 6) -> Iterable[Table]:
    """Time the fold of an 8B model's adapter beside the physical limit, and PEFT's conversion."""
    peft_seconds = convert_with_peft()
    found = {name: measure_one(name, repeats, peft_seconds) for name in DECOMPOSITIONS}
    matrices = LAYERS * len(LINEARS) * 2
    title = f"Fold of {matrices} matrices in Llama-3.1-8B's shapes, r = {RANK}, median of {repeats} [95 %]"
    table = table_of(title, "", *found)
    for row in found[DECOMPOSITIONS[0]]:
        table.add_row(row, *(figures[row] for figures in found.values()))
    yield table
