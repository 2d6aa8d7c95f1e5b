"""The command `loraover export mlx`."""

from __future__ import annotations

from pathlib import Path

import click

from loraover.common.command_line import Command, quiet_libraries
from loraover_export.cli import EXIT_CODES
from loraover_export.cli.options import MODEL, PATH, dtype_option

EXAMPLES = [
    "loraover export mlx folded -o mlx-adapter",
    "loraover export mlx runs/a/adapter -o mlx-adapter --dtype bf16",
]


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("source", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="New folder for the adapter.")
@MODEL
@dtype_option()
@click.option("--force", is_flag=True, help="Replace the adapter for mlx-lm that is already at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the certificate as JSON.")
def mlx(source: Path, output: Path, model: str | None, dtype: str, force: bool, as_json: bool) -> int:
    """Write SOURCE as an adapter for mlx-lm, and show how to run it.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. The scaling of every module is in the
    file, rsLoRA and patterns included. An adapter that mlx-lm would apply wrongly is refused.
    `loraover serve verify --engine mlx` compares mlx-lm's answers with PyTorch's.

    Exit code 1: a written matrix failed its check, and nothing was written.
    """
    from rich.console import Console

    from loraover.reporting.reporter import ConsoleReporter
    from loraover_export.mlx.run import export_mlx
    from loraover_export.mlx.show import show_report

    quiet_libraries()
    console = Console(stderr=as_json)
    report = ConsoleReporter(console)
    result = export_mlx(source, output, model=model, dtype=dtype, force=force, report=report)
    show_report(result, output, console)
    if as_json:
        print(result.model_dump_json(indent=1))
    return EXIT_CODES[result.verdict]
