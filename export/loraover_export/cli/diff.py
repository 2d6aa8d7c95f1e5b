"""The command `loraover export diff`."""

from __future__ import annotations

from pathlib import Path

import click

from loraover.common.command_line import Command, quiet_libraries
from loraover_export.cli.options import PATH, logits_options

EXAMPLES = [
    "loraover export diff run-1 run-2",
    "loraover export diff folded smaller --logits --prompts prompts.txt",
]


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("first", type=PATH)
@click.argument("second", type=PATH)
@click.option("--logits", is_flag=True, help="Also run both adapters on the base model and compare their logits.")
@click.option(
    "--model",
    show_default="the one that the adapters name",
    help="Base model to run for --logits, folder or hub name.",
)
@logits_options("--logits", "model")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON, with every module and angle.")
def diff(
    first: Path,
    second: Path,
    logits: bool,
    model: str | None,
    prompts: Path | None,
    device: str,
    compute_dtype: str,
    as_json: bool,
) -> int:
    """Compare the adapters FIRST and SECOND module by module: norms, differences and principal angles.

    Both are LoRA-Over checkpoints, folded adapters or plain PEFT LoRAs of one base model. A and B are not unique, so
    their products are compared, and never formed.
    """
    from rich.console import Console

    from loraover.reporting.reporter import ConsoleReporter
    from loraover_export.combine.diff import diff_adapters
    from loraover_export.combine.show import show_diff

    quiet_libraries()
    console = Console(stderr=as_json)
    result = diff_adapters(
        first,
        second,
        logits=logits,
        model=model,
        prompts=prompts,
        device=device,
        compute_dtype=compute_dtype,
        report=ConsoleReporter(console),
    )
    show_diff(result, console)
    if as_json:
        print(result.model_dump_json(indent=1))
    return 0
