"""vLLM's plug-in: adapters of several kinds, each asked for by name and compared with the answers of PyTorch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from loraover.common.command_line import quiet_libraries
from loraover_serve import verify_adapter

from benchmarks.clock import find_device
from benchmarks.gpu.checkpoints import make_base
from benchmarks.shown import Numbers, table_of
from support.conversions import make_source
from support.plugin import SOURCES, make_checkpoint_on, plugged

CHECKPOINT = "checkpoint"
KINDS = ("plain", "loha", CHECKPOINT)


def measure(size: str, options: Sequence[str]) -> Iterator[Table | Numbers]:
    """Serve the adapters with the command in $LORAOVER_VLLM, and verify each."""
    quiet_libraries()
    columns = ("adapter", "verdict", "RMS distance from PyTorch, nats", "allowed", "effect of the adapter")
    table = table_of(f"Adapters of the plug-in, {size}, on {find_device().type}", *columns, words=2)
    numbers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base, adapters = folder / "base", folder / "adapters"
        make_base(size, base)
        adapters.mkdir()
        for kind in KINDS:
            if kind == CHECKPOINT:
                make_checkpoint_on(base, adapters / kind)
            else:
                make_source(base, adapters / kind, SOURCES[kind])
        with plugged(folder / "server", (base, adapters), folder / "cache", *options) as running:
            for kind in KINDS:
                url, name = running.server.url, str(base)
                report = verify_adapter(
                    adapters / kind, endpoint=url, served_name=kind, base_name=name, without_mixed=True
                )
                (found,) = report.engines
                rms = float("nan") if found.adapter is None else found.adapter.rms
                figures = (rms, found.allowed or float("nan"), found.effect or float("nan"))
                table.add_row(kind, found.verdict, *(f"{value:.3g}" for value in figures))
                numbers[kind] = found.model_dump(mode="json")
    yield table
    yield {"plug_in": numbers}
    wrong = [f"{kind}: {found['reason']}" for kind, found in numbers.items() if found["verdict"] != "as trained"]
    if wrong:
        raise RuntimeError("; ".join(wrong))
