"""The command `loraover-export vllm`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New folder for the adapter.")
@click.option("--model", help="Model to be served, folder or hub name, instead of the adapter's base model.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="bf16", show_default=True, help="Storage type."
)
@click.option("--name", help="Name that requests will use; the output folder's otherwise.")
@click.option("--vllm-version", help="Release of vLLM whose rules apply, such as 0.33.0; 0.32.0 otherwise.")
@click.option("--force", is_flag=True, help="Replace an adapter at the output, whole or not at all.")
@click.option("--json", "as_json", is_flag=True, help="Print report, certificate and commands as JSON.")
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
    """Write SOURCE as an adapter that vLLM, SGLang and PEFT read identically, and say how to serve it.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. A pre-flight goes over all that vLLM
    refuses, or would serve wrongly without a word; an error there is exit code 2, and nothing is written.
    """
    from loraover_export.vllm.run import VllmRequest, run_vllm

    return run_vllm(VllmRequest(source, output, model, dtype, name, force, vllm_version), as_json)
