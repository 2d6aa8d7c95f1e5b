"""The command `loraover-export onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
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
