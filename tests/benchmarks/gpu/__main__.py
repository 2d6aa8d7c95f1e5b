"""Take all measurements of one GPU, and write docs/results-gpu.md and docs/results-gpu.json.

    make gpu                                              # on a machine with a CUDA GPU
    make gpu GPU='--plan tiny --page /tmp/gpu.md'         # the same code on a CPU, at tiny sizes

The same command takes again what failed, and keeps what was measured at the same commit on the same device. The exit
code is 1 if a measurement failed or was not begun.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import click

from loraover.common.command_line import run
from loraover.models.device import choose_device

from benchmarks.__main__ import measure_here
from benchmarks.gpu.page import write_page
from benchmarks.gpu.parts import DEVICES, PARTS
from benchmarks.gpu.run import Outcome, run_part
from benchmarks.page import PAGE, ROOT, find_origin

RESULTS = PAGE.with_name("results-gpu.md")


def run_plan(plan: str, names: tuple[str, ...], page: Path, records: Path, until: float) -> list[str]:
    """Take the measurements of a plan, write the page after each, and return the names of those that failed."""
    device = choose_device(DEVICES[plan])
    os.environ["LORAOVER_DEVICE"] = device.type
    origin = find_origin(page=page if page.is_relative_to(ROOT) else RESULTS)
    line = origin.line(_gpu())
    place = {"commit": origin.commit, "device": _gpu() or origin.machine.partition(",")[0], "plan": plan}
    records.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, Outcome] = {}
    for name, part in PARTS.items():
        if part.options(plan) is None:
            continue
        is_chosen = not names or name in names
        if is_chosen:
            print(f"{name}: at most {part.limit_s:.0f} s; its output is in {records / name}.log", flush=True)
        found = run_part(name, plan, part, records, place, until - time.time() if is_chosen else 0)
        if is_chosen:
            print(f"{name}: {f'failed. {found.reason}' if found.reason else f'{found.seconds:.0f} s'}", flush=True)
        if is_chosen or not found.reason:
            outcomes[name] = found
            write_page(page, line, outcomes)
    return [name for name, outcome in outcomes.items() if outcome.reason]


def _gpu() -> str | None:
    """Return the name of the GPU that is measured, or None for a CPU; other processes use it, and not this one."""
    import torch

    return torch.cuda.get_device_name() if os.environ["LORAOVER_DEVICE"] == "cuda" else None


@click.command()
@click.option("--plan", type=click.Choice(tuple(DEVICES)), default="card", show_default=True, help="Sizes and device.")
@click.option("--part", "names", multiple=True, type=click.Choice(tuple(PARTS)), help="Measurement; repeatable.")
@click.option("--page", type=click.Path(path_type=Path), default=RESULTS, help="Page to write.")
@click.option(
    "--records", type=click.Path(path_type=Path), default=ROOT / "runs" / "gpu", help="Folder of the records."
)
@click.option("--minutes", default=25.0, show_default=True, help="Minutes for all, from --since on.")
@click.option("--since", type=float, help="Time at which the minutes began, in seconds; now if it is left out.")
@click.argument("into", type=click.Path(path_type=Path), required=False)
def main(
    plan: str, names: tuple[str, ...], page: Path, records: Path, minutes: float, since: float | None, into: Path | None
) -> int:
    """Take the measurements, or one of them into a file."""
    if into is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background would ignore
        part = PARTS[names[0]]
        measure_here(part.module, into, **(part.options(plan) or {}))
        return 0
    until = (time.time() if since is None else since) + 60 * minutes
    failed = run_plan(plan, names, page.resolve(), records, until)
    if failed:
        print(f"failed: {', '.join(failed)}; the same command tries them again.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run(main))
