"""Time of the unfolded forward: cores applied to activations, beside A and B as matrices, and beside the layer itself.

The layers are those of Llama-3.1-8B with rank 16, and 256 tokens run at once. Cores and A and B compute in float64, as
in a check, and the layer's own product in float32. Each round times all three, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.table import Table

from loraover.common.threads import one_thread
from loraover.overparam.decompositions import Decomposition, make_decomposition

from benchmarks.clock import timed
from benchmarks.intervals import median_ratio
from benchmarks.shown import table_of

LAYERS = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "gate_proj": (14336, 4096), "down_proj": (4096, 14336)}
RANK, TOKENS = 16, 256
CPU = torch.device("cpu")


def made(kind: Decomposition, m: int, n: int, seed: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Cores of a random matrix, moved from where they start, and their product."""
    generator = torch.Generator().manual_seed(seed)
    start = kind.init(torch.randn(1, m, n, dtype=torch.float64, generator=generator), [generator])
    cores = tuple(core + 0.01 * torch.randn(core.shape, dtype=core.dtype, generator=generator) for core in start)
    return cores, kind.contract(cores, m, n)[0]


def row(name: str, rounds: int) -> tuple[str, ...]:
    """Time one layer."""
    (m, n), kind = LAYERS[name], make_decomposition("mpo")
    (cores_a, a), (cores_b, b) = made(kind, RANK, n, 0), made(kind, m, RANK, 1)
    x, weight = torch.randn(1, TOKENS, n, dtype=torch.float64), torch.randn(m, n)
    narrow = x[0].float()
    works: tuple[Callable[[], Any], ...] = (
        lambda: kind.apply(cores_b, kind.apply(cores_a, x, RANK, n), m, RANK),
        lambda: x[0] @ a.mT @ b.mT,
        lambda: narrow @ weight.mT,
    )
    for work in works:
        work()
    unfolded, factors, layer = zip(*([timed(work, CPU).whole for work in works] for _ in range(rounds)), strict=True)
    count = sum(kind.multiplications(*shape, TOKENS) for shape in ((RANK, n), (m, RANK)))
    by_count = count / (TOKENS * RANK * (m + n))
    return name, f"{by_count:.1f}", *(median_ratio(unfolded, other).shown() for other in (factors, layer))


def measure(rounds: int = 15) -> Iterable[Table]:
    """Yield the table of ratios with their 95 % intervals."""
    title = f"Unfolded forward of rank {RANK}, {TOKENS} tokens, one thread, as a multiple"
    table = table_of(title, "layer", "of A and B, by count", "of A and B, time", "of the layer in fp32, time")
    with one_thread():
        for name in LAYERS:
            table.add_row(*row(name, rounds))
    yield table
