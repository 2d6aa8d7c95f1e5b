"""What the device can do: bytes a second that it copies, and multiplications a second in each data type.

The other tables compare with rates that were measured in the same run, and not with those of a data sheet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

import torch
from rich.table import Table

from loraover.common.provenance import hardware

from benchmarks.clock import find_device, timed
from benchmarks.shown import Numbers, table_of

REPEATS = 7


def measure(square: int, mib: int) -> Iterator[Table | Numbers]:
    """Measure copies and products."""
    device = find_device()
    there, other = (torch.zeros(2**20 * mib, dtype=torch.uint8, device=device) for _ in range(2))
    here = torch.zeros(2**20 * mib, dtype=torch.uint8, pin_memory=device.type == "cuda")
    size = 2**20 * mib / 1e9
    rates = {
        "copy within its memory, read and write": (2 * size / seconds(lambda: other.copy_(there)), "GB/s"),
        "copy from the host's memory": (size / seconds(lambda: there.copy_(here)), "GB/s"),
    }
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        matrix = torch.randn(square, square, device=device).to(dtype)
        taken = seconds(lambda matrix=matrix: matrix @ matrix)  # type: ignore[misc]
        rates[f"product of {square:,} x {square:,} matrices, {name}"] = (2 * square**3 / taken / 1e12, "TFLOP/s")
    table = table_of(hardware(), "", "rate", caption=f"Medians of {REPEATS}.")
    for name, (rate, unit) in rates.items():
        table.add_row(name, f"{rate:,.3g} {unit}")
    yield table
    yield {"rates": {name: rate for name, (rate, _) in rates.items()}}


def seconds(work: Callable[[], object]) -> float:
    """Return the median seconds of some work on the device, after a first time that does not count."""
    device = find_device()
    found = [timed(work, device).whole for _ in range(REPEATS + 1)]
    return median(found[1:])
