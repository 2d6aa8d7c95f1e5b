"""What each new version of an adapter adds to the memory of vLLM's worker: under the plug-in, and on the stock server.

    cd tests && ../.venv/bin/python -m benchmarks.churn_memory [VERSIONS]

The adapters and servers are those of `benchmarks.churn`, but nothing runs beside a change, which would end the stock
server: each version is written (and loaded, on the stock server, from a new folder), and answers five requests.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import torch

from benchmarks.churn import ADAPTERS, PROMPTS, TOKENS, WORKER, Churned, Models, served
from benchmarks.shown import console, table_of

KINDS = ("plug-in", "stock, new folders")
REQUESTS = 5
MARKS = 8
"""Number of looks at the memory."""


def replaced(kind: str, versions: int, folder: Path) -> list[float]:
    """Return the worker's resident memory in MiB, at the start and after each eighth of the versions."""
    with served(kind, folder) as (running, models):
        memory = []
        for number in range(versions + 1):
            name = f"a{number % ADAPTERS}"
            if number:
                running.change(kind, models, name, number + ADAPTERS)
            _ask(running, models, name)
            if number % max(1, versions // MARKS) == 0:
                memory.append(sum(mib for who, mib in running.memory().items() if who.startswith(WORKER)))
        return memory


def _ask(running: Churned, models: Models, name: str) -> None:
    for request in range(REQUESTS):
        prompt = models.prompts[request % PROMPTS].tolist()
        running.server.complete(name, prompt, max_tokens=TOKENS, timeout_s=120)


@click.command()
@click.argument("versions", type=click.IntRange(MARKS), default=400)
def main(versions: int) -> None:
    """Give two servers VERSIONS new versions of twelve adapters, one after another, and show their worker's memory."""
    torch.set_num_threads(1)
    each = versions // MARKS
    table = table_of(
        f"Memory of vLLM's worker in MiB, after so many versions of {ADAPTERS} adapters",
        *("server", *(str(number) for number in range(0, MARKS * each + 1, each)), "KiB a version, second half"),
        caption=f"Each version answers {REQUESTS} requests of {TOKENS} tokens; nothing runs beside.",
    )
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as scratch:
            memory = replaced(kind, MARKS * each, Path(scratch) / "churn")
        slope = 1024 * (memory[-1] - memory[MARKS // 2]) / (each * (MARKS - MARKS // 2))
        table.add_row(kind, *(f"{mib:.0f}" for mib in memory), f"{slope:.1f}")
        console().print(f"{kind}: {', '.join(f'{mib:.1f}' for mib in memory)} MiB")
    console().print(table)


if __name__ == "__main__":
    main()
