"""The command `loraover-export mlx`."""

from __future__ import annotations

from pathlib import Path

import click

from loraover.common.command_line import Command, DtypeChoice, quiet_libraries
from loraover_export.cli import EXIT_CODES

EXAMPLES = [
    "loraover export mlx folded -o mlx-adapter",
    "loraover export mlx runs/a/adapter -o mlx-adapter --dtype bf16",
]


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New folder for the adapter.")
@click.option("--model", show_default="the one that the adapter names", help="Base model, folder or hub name.")
@click.option(
    "--dtype",
    type=DtypeChoice("fp32", "bf16", "fp16"),
    default="fp32",
    show_default=True,
    help="Data type to store the adapter in; PyTorch's names, such as bfloat16, are accepted too.",
)
@click.option("--force", is_flag=True, help="Replace the adapter that is already at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the certificate as JSON.")
def mlx(source: Path, output: Path, model: str | None, dtype: str, force: bool, as_json: bool) -> int:
    """Write SOURCE as an adapter for mlx-lm, and show how to run it.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. The scaling of every module is in the
    file, rsLoRA and patterns included. An adapter that mlx-lm would apply wrongly is refused.
    `loraover-serve verify --engine mlx` compares mlx-lm's answers with PyTorch's.

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
