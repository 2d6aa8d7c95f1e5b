"""The command `loraover export convert`."""

from __future__ import annotations

from pathlib import Path

import click

from loraover.common.command_line import Command, quiet_libraries
from loraover_export.cli import EXIT_CODES
from loraover_export.cli.options import PATH, dtype_option, logits_options

EXAMPLES = [
    "loraover export convert loha -o lora",
    "loraover export convert oft -o lora --rank 64 --check-error",
]


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("source", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="New folder for the LoRA.")
@click.option(
    "--rank",
    type=int,
    show_default="the exact one",
    help="Largest rank of the LoRA; what does not fit into it is lost, and the loss is shown.",
)
@click.option("--model", show_default="the adapter's base model", help="Base model, folder or hub name.")
@dtype_option("LoRA")
@click.option(
    "--check-error",
    is_flag=True,
    help="Also compare the LoRA's logits with the source's; an exact LoRA has to keep them but for rounding.",
)
@logits_options("--check-error")
@click.option("--force", is_flag=True, help="Replace the certified LoRA that is already at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print ranks and certificate as JSON.")
def convert(
    source: Path,
    output: Path,
    rank: int | None,
    model: str | None,
    dtype: str,
    check_error: bool,
    prompts: Path | None,
    device: str,
    compute_dtype: str,
    force: bool,
    as_json: bool,
) -> int:
    """Write SOURCE, a PEFT adapter of one of 27 kinds, as a plain LoRA that engines read.

    The LoRA is exact if the kind has a finite rank: AdaLoRA, VeRA, VB-LoRA, HRA, MiSS, LoHa, LoKr, PiSSA, OLoRA and
    others. For kinds of full rank, such as OFT, DoRA and IA3, or to get a smaller rank, ask for an approximation with
    --rank. Kinds that change no weights are refused.

    Exit code 1: a matrix or, with --check-error, the logits of an exact LoRA failed their check, and nothing was
    written. Exit code 3: the LoRA was written, but it changes logits too little for --check-error to distinguish it
    from an adapter that does nothing.
    """
    from rich.console import Console

    from loraover.reporting.reporter import ConsoleReporter
    from loraover_export.convert.run import convert_adapter
    from loraover_export.convert.show import show_report

    quiet_libraries()
    console = Console(stderr=as_json)
    result = convert_adapter(
        source,
        output,
        rank=rank,
        model=model,
        dtype=dtype,
        check_error=check_error,
        prompts=prompts,
        device=device,
        compute_dtype=compute_dtype,
        force=force,
        report=ConsoleReporter(console),
    )
    show_report(result, output, console)
    if as_json:
        print(result.model_dump_json(indent=1))
    return EXIT_CODES[result.certificate.verdict]
