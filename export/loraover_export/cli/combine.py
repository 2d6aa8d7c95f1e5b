"""The command `loraover export combine`."""

from __future__ import annotations

from pathlib import Path

import click

from loraover.common.command_line import Command, quiet_libraries
from loraover_export.cli import EXIT_CODES
from loraover_export.cli.options import PATH, dtype_option

EXAMPLES = [
    "loraover export combine maths code -o both",
    "loraover export combine maths code -o both --weights 0.7,0.3 --dtype bf16",
]


def _numbers(context: click.Context, option: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    try:
        return None if value is None else tuple(map(float, value.split(",")))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 0.7,0.3.") from None


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("sources", nargs=-1, required=True, type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="New folder for the adapter.")
@click.option(
    "--weights",
    metavar="NUMBERS",
    callback=_numbers,
    show_default="1 for each",
    help="Weight of each adapter, with commas between them, such as 0.7,0.3.",
)
@dtype_option()
@click.option("--force", is_flag=True, help="Replace the certified adapter that is already at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the certificate as JSON.")
def combine(
    sources: tuple[Path, ...],
    output: Path,
    weights: tuple[float, ...] | None,
    dtype: str,
    force: bool,
    as_json: bool,
) -> int:
    """Write the weighted sum of SOURCES as one plain LoRA adapter, exactly.

    SOURCES are LoRA-Over checkpoints, folded adapters or plain PEFT LoRAs of one base model. The ranks are
    concatenated; where the adapters share directions, the sum has a smaller rank and is written with it.

    Exit code 1: a written matrix failed its check, and nothing was written.
    """
    from rich.console import Console

    from loraover.reporting.reporter import ConsoleReporter
    from loraover_export.combine.combine import combine_adapters
    from loraover_export.uniform.show import show_lora

    quiet_libraries()
    console = Console(stderr=as_json)
    report = ConsoleReporter(console)
    certificate = combine_adapters(sources, output, weights=weights, dtype=dtype, force=force, report=report)
    show_lora(certificate, output, console)
    if as_json:
        print(certificate.model_dump_json(indent=1))
    return EXIT_CODES[certificate.verdict]
