"""The command `loraover-export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loraover.common.command_line import entry_point


@click.group()
@click.version_option(package_name="loraover")
def cli() -> None:
    """Fold LoRA-Over checkpoints into plain LoRA adapters, prove the fold, and export for vLLM and ONNX Runtime."""


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New folder for the adapter.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True, help="Storage type."
)
@click.option("--check-error", is_flag=True, help="Compare outputs with the unfolded model too.")
@click.option("--base", help="Base model, folder or hub name, instead of the one that the checkpoint names.")
@click.option("--prompts", type=click.Path(path_type=Path), help="Text file with one prompt a line, for --check-error.")
@click.option("--force", is_flag=True, help="Replace a folded adapter at the output, whole or not at all.")
@click.option("--json", "as_json", is_flag=True, help="Print the certificate as JSON.")
def fold(
    checkpoint: Path,
    output: Path,
    dtype: str,
    check_error: bool,
    base: str | None,
    prompts: Path | None,
    force: bool,
    as_json: bool,
) -> int:
    """Contract CHECKPOINT's cores into a plain PEFT adapter and certify every matrix.

    CHECKPOINT is a LoRA-Over checkpoint or a Trainer's checkpoint-N. Exit code 1: the check failed, and no adapter
    was left behind. Exit code 3: the adapter was written, but --check-error is inconclusive, since the adapter moves
    no logit by twice the error that is allowed.
    """
    from loraover_export.fold.run import run_fold

    return run_fold(checkpoint, output, dtype, check_error, base, prompts, as_json, force)


@cli.command()
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


@cli.command()
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New folder for the export.")
@click.option("--mode", required=True, type=click.Choice(["merged", "swappable"]), help="How adapters meet the graph.")
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "int4"]), default="fp32", show_default=True, help="Of the graph."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="To build for.")
@click.option("--base", help="Base model, folder or hub name, instead of the one that the adapters name.")
@click.option("--cache/--no-cache", default=True, show_default=True, help="KV cache in a language model's graph.")
@click.option("--name", "names", multiple=True, help="Of an adapter, in the order of SOURCE; its folder's otherwise.")
@click.option("--graph", type=click.Path(path_type=Path), help="Earlier swappable export to add adapters to.")
@click.option("--check/--no-check", default=True, show_default=True, help="Run ONNX Runtime against PyTorch.")
@click.option("--force", is_flag=True, help="Replace an export at the output, whole or not at all.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def onnx(as_json: bool, **request: Any) -> int:
    """Write ONNX graphs with SOURCE merged into the weights, or with adapters to swap at run time.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA; swappable takes several. Decoder models
    become one onnxruntime-genai graph with a KV cache, T5 an encoder and a decoder, classifiers one graph. Exit code 1:
    ONNX Runtime's outputs are too far from the unfolded PyTorch model's, and nothing was left behind. Exit code 3: the
    export was written, but its check is inconclusive, since an adapter moves no logit by twice the error that is
    allowed.
    """
    from loraover_export.onnx.request import OnnxRequest
    from loraover_export.onnx.run import run_onnx

    return run_onnx(OnnxRequest(**request), as_json)


main = entry_point(cli)

if __name__ == "__main__":
    main()
