"""The command `loraover export check`."""

from __future__ import annotations

from pathlib import Path

import click

from loraover.common.command_line import Command, quiet_libraries
from loraover_export.check.engines import ENGINES
from loraover_export.cli.options import MODEL, PATH

EXAMPLES = [
    "loraover export check runs/a/adapter",
    "loraover export check my-lora --engine vllm --engine llamacpp --model ./Qwen3-0.6B",
]


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("adapter", type=PATH)
@click.option(
    "--engine",
    "engines",
    type=click.Choice(list(ENGINES)),
    multiple=True,
    help="Engine to judge for (repeatable).",
)
@MODEL
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def check(adapter: Path, engines: tuple[str, ...], model: str | None, as_json: bool) -> int:
    """Say for each engine whether it would refuse ADAPTER or apply it wrongly without a message, and what repairs that.

    ADAPTER is a LoRA-Over checkpoint or a PEFT adapter of any method. No engine is run or needs to be installed. Each
    engine is judged on the adapter as it is, in PEFT's form, and on what the export for that engine writes.

    Exit code 1: an engine refuses the adapter as it is, or applies it wrongly. `--engine` chooses the engines that
    matter to you: mlx-lm, for instance, has a format of its own and refuses every adapter as it is.
    """
    from rich.console import Console

    from loraover.reporting.reporter import ConsoleReporter
    from loraover_export.check.run import check_adapter
    from loraover_export.check.show import show_report

    quiet_libraries()
    console = Console(stderr=as_json)
    result = check_adapter(adapter, engines=engines, model=model, report=ConsoleReporter(console))
    show_report(result, console)
    if as_json:
        print(result.model_dump_json(indent=1))
    return 0 if result.passed else 1
