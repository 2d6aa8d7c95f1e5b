"""The command `loraover export gguf`."""

from __future__ import annotations

from pathlib import Path

import click

from loraover.common.command_line import Command, DtypeChoice, quiet_libraries
from loraover_export.cli import EXIT_CODES
from loraover_export.cli.options import MODEL, PATH

EXAMPLES = [
    "loraover export gguf folded -o adapter.gguf",
    "loraover export gguf runs/a/adapter -o adapter.gguf --base-gguf SmolLM2-135M-Instruct-F32.gguf",
]


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("source", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="New file for the adapter.")
@MODEL
@click.option(
    "--dtype",
    type=DtypeChoice("fp32", "fp16", "bf16"),
    default="fp32",
    show_default=True,
    help="Data type to store the adapter in; PyTorch's names, such as bfloat16, are accepted too.",
)
@click.option(
    "--base-gguf",
    type=PATH,
    help="GGUF file of the base model, on which llama.cpp runs the adapter for a comparison with PyTorch.",
)
@click.option(
    "--threads", type=int, show_default="one for each core", help="Number of threads for llama.cpp, with --base-gguf."
)
@click.option("--force", is_flag=True, help="Replace the GGUF adapter that is already at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def gguf(
    source: Path,
    output: Path,
    model: str | None,
    dtype: str,
    base_gguf: Path | None,
    threads: int | None,
    force: bool,
    as_json: bool,
) -> int:
    """Write SOURCE as a GGUF adapter for llama.cpp, and run it there on your GGUF file of the base model.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. The scaling of every module is in the
    file, rsLoRA and patterns included, and the rows of queries and keys are in llama.cpp's order. An adapter that
    llama.cpp would apply wrongly or only in part is refused.

    Exit code 1: a matrix or llama.cpp's logits failed their check, and nothing was written. Exit code 3: the adapter
    was written, but it changes logits too little for the check to distinguish it from one that does nothing.
    """
    from rich.console import Console

    from loraover.reporting.reporter import ConsoleReporter
    from loraover_export.gguf.run import export_gguf
    from loraover_export.gguf.show import show_report

    quiet_libraries()
    console = Console(stderr=as_json)
    result = export_gguf(
        source,
        output,
        model=model,
        dtype=dtype,
        base_gguf=base_gguf,
        threads=threads,
        force=force,
        report=ConsoleReporter(console),
    )
    show_report(result, output, console)
    if as_json:
        print(result.model_dump_json(indent=1))
    return EXIT_CODES[result.verdict]
