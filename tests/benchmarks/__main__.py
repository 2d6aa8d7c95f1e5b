"""Run the benchmarks one after the other, and write their tables into docs/results.md.

    cd tests && ../.venv/bin/python -m benchmarks [--only NAME] [--no-write]

Each benchmark is a module with a function `measure`, and runs in a fresh process. The exit code is 1 if one of them
failed, whose old tables stay on the page.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.table import Table

from loraover.common.atomic_output import publish_text
from loraover.common.command_line import run

from benchmarks.page import PAGE, check_markers, find_origin, write_figures
from benchmarks.shown import Numbers, Plot, console, to_markdown

BENCHMARKS = (
    "step_overhead",
    "training",
    "schedules",
    "folding",
    "fold_scaling",
    "low_rank",
    "unfolded_forward",
    "exports",
    "conversions",
    "large",
    "merges",
    "streaming",
    "fleet",
    "plugin",
    "planning",
    "many_processes",
    "recording",
    "reference_check",
    "reference_size",
)


class Measured(NamedTuple):
    """What a benchmark found."""

    parts: list[str | Plot]
    gpu: str | None


class BenchmarkError(Exception):
    """A benchmark ended without its figures."""


def run_benchmarks(
    names: Sequence[str], page: Path | None, measure: Callable[[str], Measured] | None = None
) -> list[str]:
    """Run benchmarks, write what each one found before the next begins, and return the names of those that failed."""
    if page is not None:
        check_markers(names, page)
    failed = []
    for name in names:
        origin = None if page is None else find_origin(page=page)
        started = time.perf_counter()
        try:
            found = (measure or measure_in_process)(name)
        except BenchmarkError as error:
            print(f"{name} failed: {error}", file=sys.stderr)
            failed.append(name)
            continue
        if page is not None and origin is not None:
            write_figures(name, origin.line(found.gpu), found.parts, page)
        print(f"{name}: {time.perf_counter() - started:.0f} s\n", flush=True)
    return failed


def measure_in_process(name: str) -> Measured:
    """Run one benchmark in a fresh process, which prints its tables as they come."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "found.json"
        command = [sys.executable, "-m", "benchmarks", "--only", name, "--into", str(file)]
        done = subprocess.run(command, cwd=Path(__file__).parents[1])
        if done.returncode:
            raise BenchmarkError(f"its process ended with exit code {done.returncode}")
        found = json.loads(file.read_text(encoding="utf-8"))
    return Measured([part if isinstance(part, str) else Plot(**part) for part in found["parts"]], found["gpu"])


def measure_here(name: str, file: Path, **options: Any) -> None:
    """Run one benchmark in this process: print its tables, and write what it has found so far to a file."""
    shown = console()
    parts: list[str | dict[str, str]] = []
    numbers: Numbers = {}
    for part in importlib.import_module(f"benchmarks.{name}").measure(**options):
        if isinstance(part, Table):
            shown.print(part)
            parts.append(to_markdown(part))
        elif isinstance(part, Plot):
            parts.append(asdict(part))
        else:
            numbers |= part
        publish_text(file, json.dumps({"parts": parts, "numbers": numbers, "gpu": used_gpu()}))


def used_gpu() -> str | None:
    """Return the name of the GPU on which this process had tensors, or None."""
    import torch

    is_used = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    return torch.cuda.get_device_name() if is_used else None


@click.command()
@click.option("--only", "names", multiple=True, type=click.Choice(BENCHMARKS), help="Benchmark to run; repeatable.")
@click.option("--no-write", is_flag=True, help="Print the tables, and leave docs/results.md as it is.")
@click.option("--into", type=click.Path(path_type=Path), hidden=True)
def main(names: tuple[str, ...], no_write: bool, into: Path | None) -> int:
    """Measure what LoRA-Over costs beside its peers, and write the tables of docs/results.md."""
    if into is not None:
        measure_here(names[0], into)
        return 0
    failed = run_benchmarks(names or BENCHMARKS, None if no_write else PAGE)
    if failed:
        print(f"failed: {', '.join(failed)}; their tables are the old ones.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run(main))
