"""Parity on vLLM: is a folded adapter as fast as a plain LoRA of its shape, and does it give the answers it should?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from loraover.common.command_line import quiet_libraries
from loraover_export import export_vllm
from loraover_serve import measure_parity

from benchmarks.clock import find_device
from benchmarks.gpu.checkpoints import RANK, make_checkpoint
from benchmarks.shown import Numbers, table_of
from support.vllm_command import vllm_command


def measure(size: str, prompts: int, options: Sequence[str]) -> Iterator[Table | Numbers]:
    """Measure with the command in $LORAOVER_VLLM."""
    quiet_libraries()
    device = find_device().type
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = make_checkpoint(size, Path(scratch))
        exported = Path(scratch) / "for-vllm"
        export_vllm(checkpoint, exported)
        report = measure_parity(
            exported,
            checkpoint=checkpoint,
            engines=["vllm"],
            vllm=vllm_command(),
            num_prompts=prompts,
            new_tokens=16,
            memory=0,
            device=device,
            options=options,
        )
    version = report.versions.get("vllm", "")
    table = table_of(
        f"`loraover serve parity`, vLLM {version} on {device}, {size}, r = {RANK}, {prompts} prompts",
        *("measure", "arm", "arm / plain LoRA [95 %]", "blocks"),
        words=3,
        caption=f"{report.verdict}: {report.reason}",
    )
    for result in report.results:
        low, high = result.interval
        table.add_row(result.measure, result.arm, f"{result.ratio:.3f} [{low:.3f}, {high:.3f}]", str(result.blocks))
    yield table
    yield {"parity": report.model_dump(mode="json", exclude={"runs"})}
    if report.verdict in ("different", "failed") or not all(outputs.agree for outputs in report.outputs):
        raise RuntimeError(f"parity on vLLM: {report.verdict}: {report.reason}")
