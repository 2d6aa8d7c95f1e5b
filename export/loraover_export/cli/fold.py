"""The command `loraover export fold`."""

from __future__ import annotations

from pathlib import Path

import click

from loraover.common.command_line import Command, quiet_libraries
from loraover_export.cli import EXIT_CODES
from loraover_export.cli.options import PATH, dtype_option, logits_options

EXAMPLES = [
    "loraover export fold runs/demo/lora-over/adapter -o folded",
    "loraover export fold output/checkpoint-500 -o folded --dtype bf16 --check-error",
    "loraover export fold output/checkpoint-500 -o folded --check-error --device cuda --compute-dtype bf16",
]


@click.command(cls=Command, examples=EXAMPLES, renamed={"--base": "--model"})
@click.argument("checkpoint", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="New folder for the adapter.")
@dtype_option()
@click.option(
    "--check-error",
    is_flag=True,
    help="Also compare the adapter's logits with those of the model that still computes with cores.",
)
@click.option(
    "--model",
    show_default="the one that the checkpoint names",
    help="Base model to run for --check-error, folder or hub name.",
)
@logits_options("--check-error")
@click.option("--force", is_flag=True, help="Replace the folded adapter that is already at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the certificate as JSON.")
def fold(
    checkpoint: Path,
    output: Path,
    dtype: str,
    check_error: bool,
    model: str | None,
    prompts: Path | None,
    device: str,
    compute_dtype: str,
    force: bool,
    as_json: bool,
) -> int:
    """Contract CHECKPOINT's cores into a plain PEFT adapter and certify every matrix.

    CHECKPOINT is the adapter folder of a LoRA-Over run, or a checkpoint-N of a Hugging Face Trainer. Its cores are the
    small tensors that training kept in place of each LoRA matrix; multiplied out, they give the matrix again.

    Exit code 1: a check failed, and nothing was written. Exit code 3: the adapter was written, but it changes logits
    too little for --check-error to distinguish it from an adapter that does nothing.
    """
    from rich.console import Console

    from loraover.reporting.reporter import ConsoleReporter
    from loraover_export.fold.run import fold_checkpoint
    from loraover_export.fold.show import show_certificate

    quiet_libraries()
    console = Console(stderr=as_json)
    certificate = fold_checkpoint(
        checkpoint,
        output,
        dtype=dtype,
        check_error=check_error,
        model=model,
        prompts=prompts,
        device=device,
        compute_dtype=compute_dtype,
        force=force,
        report=ConsoleReporter(console),
    )
    show_certificate(certificate, output, console)
    if as_json:
        print(certificate.model_dump_json(indent=1))
    return EXIT_CODES[certificate.verdict]
