"""The command `loraover export vllm`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from loraover.common.command_line import Command, quiet_libraries
from loraover_export.cli.options import PATH, dtype_option

EXAMPLES = [
    "loraover export vllm folded -o vllm-adapter",
    "loraover export vllm folded -o vllm-adapter --model ./Qwen3-0.6B --name support --vllm-version 0.33.0",
]


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("source", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="New folder for the adapter.")
@click.option("--model", show_default="the adapter's base model", help="Model to be served, folder or hub name.")
@dtype_option(default="bf16")
@click.option("--name", show_default="the output folder's name", help="Name by which requests choose the adapter.")
@click.option("--vllm-version", show_default="0.32.0", help="Release of vLLM whose rules apply, such as 0.33.0.")
@click.option("--force", is_flag=True, help="Replace the adapter for vLLM that is already at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print pre-flight report, certificate and commands as JSON.")
def vllm(
    source: Path,
    output: Path,
    model: str | None,
    dtype: str,
    name: str | None,
    vllm_version: str | None,
    force: bool,
    as_json: bool,
) -> int:
    """Write SOURCE as an adapter that vLLM, SGLang and PEFT read identically, and show how to serve it.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. A pre-flight first checks it against
    vLLM's loading rules: what vLLM refuses, and what it would serve wrongly without a message.

    Exit code 2: the pre-flight found an error, and nothing was written. Exit code 1: a written matrix failed its
    check, and nothing was written.
    """
    from rich.console import Console

    from loraover.reporting.reporter import ConsoleReporter
    from loraover_export.vllm.run import export_vllm
    from loraover_export.vllm.show import show_report

    quiet_libraries()
    console = Console(stderr=as_json)
    result = export_vllm(
        source,
        output,
        model=model,
        dtype=dtype,
        name=name,
        vllm_version=vllm_version,
        force=force,
        report=ConsoleReporter(console),
    )
    show_report(result, output, console)
    if as_json:
        found = {key: value for key, value in result.model_dump().items() if value is not None}
        print(json.dumps(found, indent=1))
    if not result.preflight.passed:
        return 2
    return 0 if result.passed else 1
