"""The command `loraover export merge`."""

from __future__ import annotations

from pathlib import Path

import click

from loraover.common.command_line import Command, quiet_libraries
from loraover_export.cli import EXIT_CODES
from loraover_export.cli.options import MODEL, PATH

EXAMPLES = [
    "loraover export merge folded -o merged",
    "loraover export merge folded -o merged --model ./Qwen3-0.6B",
]


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("source", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="New folder for the model.")
@MODEL
@click.option("--force", is_flag=True, help="Replace the merged model that is already at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def merge(source: Path, output: Path, model: str | None, force: bool, as_json: bool) -> int:
    """Write the base model with SOURCE merged into its weights, and say how much of the adapter rounding erased.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. Each sum is computed in float64 and
    rounded once to the data type of the base model's weight. The memory is that of the largest tensor.

    Exit code 1: a written weight failed its check, and nothing was written.
    """
    from rich.console import Console

    from loraover.reporting.reporter import ConsoleReporter
    from loraover_export.merge.run import merge_adapter
    from loraover_export.merge.show import show_merge

    quiet_libraries()
    console = Console(stderr=as_json)
    result = merge_adapter(source, output, model=model, force=force, report=ConsoleReporter(console))
    show_merge(result, output, console)
    if as_json:
        print(result.model_dump_json(indent=1))
    return EXIT_CODES[result.verdict]
