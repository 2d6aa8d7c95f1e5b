"""CPU seconds of check, prepare and convert for an adapter of Llama-3.1-8B's shapes, beside handling its bytes.

The adapter is a LoRA of rank 32 on all linear layers in bfloat16 (160 MiB). Handling reads the file, hashes it with
SHA-256, and writes and syncs a copy. "First" is with an empty cache, in a process that has prepared another adapter;
"later" is the second time. The cold command is a new process that checks an adapter of a model that was seen before.
"""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from loraover.common.atomic_output import sync
from loraover_export import check_adapter, convert_adapter, prepare_adapter

from benchmarks.shapes import MODELS, Llama
from benchmarks.shown import table_of
from support.plain_adapter import write_adapter

RANK, REPEATS = 32, 3
SHAPES = MODELS["Llama-3.1-8B"]


def make_plain(folder: Path, base: Path, seed: int, rank: int = RANK, shapes: Llama = SHAPES) -> Path:
    """Write a LoRA in bfloat16 on all linear layers of a Llama, with a scaling of 2."""
    pairs = shapes.pairs(rank, torch.Generator().manual_seed(seed), torch.bfloat16)
    targets = sorted(path.rpartition(".")[2] for path in shapes.linears)
    return write_adapter(folder, pairs, base_model_name_or_path=str(base), target_modules=targets)


def handle(source: Path, target: Path) -> None:
    """Read, hash, write and sync the bytes of an adapter."""
    content = (source / "adapter_model.safetensors").read_bytes()
    hashlib.sha256(content).hexdigest()
    target.write_bytes(content)
    sync(target)


def cpu_s(work: Callable[[], Any]) -> float:
    """Return the CPU seconds of some work in this process."""
    before = os.times()
    work()
    after = os.times()
    return after.user + after.system - before.user - before.system


def least(work: Callable[[], Any]) -> float:
    """Return the least CPU seconds of several runs: other programs on the machine only add to them."""
    return min(cpu_s(work) for _ in range(REPEATS))


def cold_s(adapter: Path, *options: str) -> float:
    """Return the CPU seconds of a command that checks an adapter in a new process."""
    code = "import sys; from loraover_export.cli import main; main()"
    words = [sys.executable, "-c", code, "check", str(adapter), *options]

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    found = []
    for _ in range(REPEATS):
        before = spent()
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        found.append(spent() - before)
    return min(found)


def measure() -> list[Table]:
    """Measure all, on one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = folder / "base"
        SHAPES.config().save_pretrained(base)  # without weights
        adapters = [make_plain(folder / str(seed), base, seed) for seed in range(REPEATS + 1)]
        check_adapter(adapters[0], engines="vllm")
        prepare_adapter(adapters[0], folder / "warm", model=base)
        plain = least(lambda: handle(adapters[0], folder / "copy"))
        converted = iter(range(REPEATS))
        chosen = iter(adapters[1:])
        rows = {
            "read, hash, write": plain,
            "check, in a process": least(lambda: check_adapter(adapters[0], engines="vllm")),
            "check, in a process, all engines": least(lambda: check_adapter(adapters[0])),
            "check, cold command": cold_s(adapters[0], "--engine", "vllm"),
            "check, cold command, all engines": cold_s(adapters[0], "--model", str(base)),
            "prepare, first": least(lambda: prepare_adapter(next(chosen), folder / "cache", model=base)),
            "prepare, later": least(lambda: prepare_adapter(adapters[0], folder / "warm", model=base)),
            "convert": least(lambda: convert_adapter(adapters[0], folder / f"converted-{next(converted)}")),
        }
    table = table_of("CPU seconds an adapter (160 MiB)", "work", "CPU s", "times the plain handling")
    for name, seconds in rows.items():
        table.add_row(name, f"{seconds:.2f}", f"{seconds / plain:.2f}")
    return [table]
