"""Inspection of merges in the shapes of an 8B model, beside reading the same files: from disk and from memory.

One layer of Llama 3.1 8B stands for all. Files are read in pieces of 16 MiB by one thread, as a copy would; before a
run from disk, the kernel drops their pages. The ratio is the time of reading over that of the inspection, and 0.5 means
that the inspection reads at half the disk's speed. Memory is what the process has for itself at most, beyond what it
had after the inspection of a tiny merge.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from safetensors.torch import save_file

from benchmarks.shown import table_of
from benchmarks.streaming import Memory

HIDDEN, INNER, KEYS, RANK = 4096, 14336, 1024, 16
SHAPES = {
    **{"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN)},
    **{"self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN)},
    "mlp.down_proj": (HIDDEN, INNER),
}
PIECE = 2**24
RUNS = 9


def make(folder: Path, size: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a base model of one layer, an adapter, and a merge, each a folder; `size` scales the shapes."""
    generator = torch.Generator().manual_seed(0)
    base: dict[str, torch.Tensor] = {}
    merged: dict[str, torch.Tensor] = {}
    adapter: dict[str, torch.Tensor] = {}
    for name, shape in SHAPES.items():
        m, n = (max(32, int(length * size)) for length in shape)
        path = f"model.layers.0.{name}"
        weight = torch.randn(m, n, generator=generator).mul_(0.02).to(dtype)
        a, b = torch.randn(RANK, n, generator=generator), torch.randn(m, RANK, generator=generator).mul_(2e-4)
        base[f"{path}.weight"] = weight
        merged[f"{path}.weight"] = (weight.float() + 2 * b @ a).to(dtype)
        adapter |= {f"base_model.model.{path}.lora_{side}.weight": x for side, x in (("A", a), ("B", b))}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    lora = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
    for kind, tensors in {"base": base, "merged": merged, "adapter": adapter}.items():
        place = folder / kind
        place.mkdir(parents=True)
        name = "adapter_model" if kind == "adapter" else "model"
        save_file(tensors, place / f"{name}.safetensors", metadata={"format": "pt"})
        (place / ("adapter_config.json" if kind == "adapter" else "config.json")).write_text(
            json.dumps(lora if kind == "adapter" else config)
        )


def files(folder: Path) -> list[Path]:
    return [folder / kind / "model.safetensors" for kind in ("base", "merged")]


def forget(folder: Path) -> None:
    """Let the kernel drop the files' pages, so that the next run reads the disk."""
    for file in files(folder):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> float:
    """Return the seconds that reading both files takes."""
    started, piece = time.perf_counter(), bytearray(PIECE)
    for file in files(folder):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(piece):
                pass
    return time.perf_counter() - started


def inspect(folder: Path) -> tuple[float, float]:
    """Return the seconds that an inspection takes, by the clock and of the processors."""
    from loraover_export import inspect_merge

    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    report = inspect_merge(folder / "adapter", folder / "merged", model=folder / "base")
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert report.passed, report.sentence
    return time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(dtypes: tuple[str, ...] = ("bfloat16",), size: float = 1.0) -> Iterator[Table | dict[str, Any]]:
    """Yield the table of speeds, and the ratios by data type and place."""
    ratios: dict[str, float] = {}
    table = table_of(
        "One layer of an 8B model",
        *("dtype", "from", "GB", "reading, GB/s", "inspection, GB/s", "processor s", "ratio", "memory, MiB"),
        words=2,
    )
    for dtype in dtypes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            make(folder, size, getattr(torch, dtype))
            make(folder / "tiny", 0.01, getattr(torch, dtype))
            inspect(folder / "tiny")
            total = sum(file.stat().st_size for file in files(folder))
            for place in ("disk", "memory"):
                readings: list[float] = []
                inspections: list[tuple[float, float]] = []
                memory = Memory()
                with memory.measured():  # in a run of its own, since looking at memory takes time
                    inspect(folder)
                for _ in range(RUNS):  # in turns, since other work on the machine changes its speed
                    if place == "disk":
                        forget(folder)
                    readings.append(read(folder))
                    if place == "disk":
                        forget(folder)
                    inspections.append(inspect(folder))
                reading, (clock, processor) = float(np.median(readings)), np.median(inspections, axis=0)
                ratios[f"{dtype} from {place}"] = reading / clock
                speeds = [f"{total / seconds / 1e9:.2f}" for seconds in (reading, clock)]
                cells = [
                    f"{total / 1e9:.2f}",
                    *speeds,
                    f"{processor:.1f}",
                    f"{reading / clock:.2f}",
                    f"{(memory.most - memory.before) / 2**20:.0f}",
                ]
                table.add_row(dtype, place, *cells)
    yield table
    yield {"ratios": ratios}
