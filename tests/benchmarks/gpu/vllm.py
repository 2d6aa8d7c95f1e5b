"""The vLLM that the next measurements start: installed by `make` where that is asked for, and its version."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table

from loraover_serve.vllm.server import vllm_version

from benchmarks.shown import Numbers
from support.vllm_command import vllm_command

ROOT = Path(__file__).parents[3]


def measure(target: str | None) -> Iterator[Table | Numbers]:
    """Install vLLM, and show which version $LORAOVER_VLLM starts."""
    if target is not None:
        subprocess.run(["make", "--no-print-directory", target], cwd=ROOT, check=True)
    command = str(vllm_command())
    version = vllm_version(command)
    table = Table("vLLM", box=SIMPLE)
    table.add_row(str(version))
    yield table
    yield {"vllm": version}
