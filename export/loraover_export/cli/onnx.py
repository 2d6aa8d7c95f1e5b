"""The command `loraover export onnx`."""

from __future__ import annotations

from pathlib import Path

import click

from loraover.common.command_line import Command, DtypeChoice, quiet_libraries
from loraover_export.cli import EXIT_CODES
from loraover_export.cli.options import PATH, compute_dtype_option, device_option

EXAMPLES = [
    "loraover export onnx folded -o onnx-merged --mode merged --precision int4",
    "loraover export onnx adapter-a adapter-b -o onnx-swappable --mode swappable --name support --name sales",
    "loraover export onnx adapter-a adapter-b -o onnx-web --mode swappable --web",
    "loraover export onnx adapter-c -o more --mode swappable --web --graph onnx-web",
]


@click.command(cls=Command, examples=EXAMPLES, renamed={"--base": "--model"})
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="New folder for the export.")
@click.option(
    "--mode",
    required=True,
    type=click.Choice(["merged", "swappable"]),
    help="How the adapter meets the graph: merged into its weights, or as a file to load and swap at run time.",
)
@click.option(
    "--precision",
    type=DtypeChoice("fp32", "fp16", "int4"),
    show_default="that of --graph, else fp32",
    help="Number format of the graph's weights.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    show_default="that of --graph, else cpu",
    help="Device to build the graph for.",
)
@click.option("--model", show_default="the one that the adapters name", help="Base model, folder or hub name.")
@click.option(
    "--cache/--no-cache",
    default=True,
    show_default=True,
    help="Give a decoder model's graph a KV cache, or leave it out.",
)
@click.option(
    "--name",
    "names",
    multiple=True,
    show_default="the names of the sources' folders",
    help="Name of a swappable adapter's file; repeat it in the order of SOURCE.",
)
@click.option(
    "--graph",
    type=PATH,
    help="Folder of an earlier swappable export whose graph the new adapters are for; only their files are written.",
)
@click.option(
    "--web",
    is_flag=True,
    help="Write a swappable graph and adapters for onnxruntime-web, in a browser or in node.",
)
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="Compare ONNX Runtime's outputs with PyTorch's before anything is left at the output.",
)
@device_option("--check-device", "Device that PyTorch runs on for the check; --device is where the graph will run.")
@compute_dtype_option("Data type that PyTorch runs in for the check.")
@click.option("--force", is_flag=True, help="Replace the ONNX export that is already at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def onnx(
    sources: tuple[Path, ...],
    output: Path,
    mode: str,
    precision: str | None,
    device: str | None,
    model: str | None,
    cache: bool,
    names: tuple[str, ...],
    graph: Path | None,
    web: bool,
    check: bool,
    check_device: str,
    compute_dtype: str,
    force: bool,
    as_json: bool,
) -> int:
    """Write ONNX graphs with SOURCE merged into the weights, or with adapters to swap at run time.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA; swappable takes several. Decoder models
    become one onnxruntime-genai graph with a KV cache, T5 an encoder and a decoder, classifiers one graph.

    Exit code 1: ONNX Runtime's outputs are too far from the PyTorch reference's, and nothing was left at the
    output. Exit code 3: the export was written, but an adapter changes logits too little for the check to distinguish
    it from one that does nothing.
    """
    from rich.console import Console

    from loraover.reporting.reporter import ConsoleReporter
    from loraover_export.onnx.run import export_onnx
    from loraover_export.onnx.show import show_report

    quiet_libraries()
    console = Console(stderr=as_json)
    result = export_onnx(
        sources,
        output,
        mode=mode,
        precision=precision,
        device=device,
        model=model,
        cache=cache,
        names=names,
        graph=graph,
        web=web,
        check=check,
        check_device=check_device,
        compute_dtype=compute_dtype,
        force=force,
        report=ConsoleReporter(console),
    )
    show_report(result, output, console)
    if as_json:
        print(result.model_dump_json(indent=1))
    return EXIT_CODES[result.verdict]
