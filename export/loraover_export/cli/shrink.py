"""The command `loraover export shrink`."""

from __future__ import annotations

from pathlib import Path

import click

from loraover.common.command_line import Command, quiet_libraries
from loraover_export.cli import EXIT_CODES
from loraover_export.cli.options import PATH, dtype_option

EXAMPLES = [
    "loraover export shrink folded -o smaller --rank 16",
    "loraover export shrink folded -o smaller --energy 0.99 --dtype bf16",
]


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("source", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="New folder for the adapter.")
@click.option("--rank", type=int, help="Rank to keep in every module.")
@click.option(
    "--energy",
    type=float,
    help="Share of the squared Frobenius norm that every module keeps at least, such as 0.99; the rank is the smallest "
    "that keeps it in all modules.",
)
@dtype_option()
@click.option("--force", is_flag=True, help="Replace the certified adapter that is already at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the certificate as JSON.")
def shrink(
    source: Path, output: Path, rank: int | None, energy: float | None, dtype: str, force: bool, as_json: bool
) -> int:
    """Write SOURCE with a smaller rank: the best approximation of each module, with its error.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. What a module loses is the part of its
    delta that its smallest singular values make up, and no adapter of that rank loses less.

    Exit code 1: a written matrix failed its check, and nothing was written.
    """
    from rich.console import Console

    from loraover.reporting.reporter import ConsoleReporter
    from loraover_export.combine.shrink import shrink_adapter
    from loraover_export.uniform.show import show_lora

    quiet_libraries()
    console = Console(stderr=as_json)
    report = ConsoleReporter(console)
    certificate = shrink_adapter(source, output, rank=rank, energy=energy, dtype=dtype, force=force, report=report)
    show_lora(certificate, output, console)
    if as_json:
        print(certificate.model_dump_json(indent=1))
    return EXIT_CODES[certificate.verdict]
