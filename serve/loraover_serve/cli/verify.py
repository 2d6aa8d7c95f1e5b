"""The command `loraover serve verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraover.common.command_line import DeviceChoice
from loraover.models.device import DEVICES
from loraover_serve.cli.options import GRAPH, MODEL, PATH, START_TIMEOUT, VLLM, SplitAtDashes
from loraover_serve.verify.engines import ENGINES

if TYPE_CHECKING:
    from loraover_serve.verify.report import VerifyReport


@click.command(
    cls=SplitAtDashes,
    options_metavar="[OPTIONS]",
    examples=[
        "loraover serve verify folded --engine onnx --engine torch -o verified",
        "loraover serve verify runs/a/adapter --engine vllm -- --dtype float32",
        "loraover serve verify folded --engine llamacpp --base-gguf SmolLM2-135M-Instruct-Q8_0.gguf",
        "loraover serve verify shop --endpoint http://localhost:8000 --served-name shop",
    ],
)
@click.argument("adapter", metavar="ADAPTER [-- ENGINE OPTIONS]", type=PATH)
@click.option(
    "--engine",
    "engines",
    multiple=True,
    type=click.Choice(list(ENGINES)),
    show_default="onnx, unless there is an --endpoint",
    help="Engine to start and verify; repeat the option for several.",
)
@click.option("--endpoint", help="Address of an OpenAI-compatible server that already serves the adapter.")
@click.option("--served-name", help="Name by which the server at --endpoint serves the adapter.")
@click.option(
    "--base-name",
    show_default="the base model's own name, or the only other name there",
    help="Name by which the server at --endpoint serves the base model.",
)
@click.option("--endpoint-key-variable", help="Environment variable that holds the key of the server at --endpoint.")
@MODEL
@click.option(
    "--prompts",
    type=PATH,
    show_default="eight built-in prompts",
    help="UTF-8 text file, one prompt a line; the first 256 tokens of each are used.",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Length of PyTorch's greedy answers, in tokens; servers are compared at each of these tokens.",
)
@click.option(
    "--device",
    type=DeviceChoice(*DEVICES),
    default="cpu",
    show_default=True,
    help=f"Device that PyTorch runs on: {', '.join(DEVICES)}, or one GPU such as cuda:1.",
)
@VLLM
@click.option(
    "--base-gguf",
    type=PATH,
    show_default="one in F32 that is written for the comparison",
    help="GGUF file of the base model for llama.cpp, quantised or not.",
)
@GRAPH
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(1),
    default=120,
    show_default=True,
    help="Seconds that a server may take to answer one request, with its repetitions.",
)
@START_TIMEOUT
@click.option("-o", "--output", type=PATH, help="New folder for verify.json, verify.html and engines' logs.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_obj
def verify(
    options: tuple[str, ...],
    /,
    adapter: Path,
    engines: tuple[str, ...],
    endpoint: str | None,
    served_name: str | None,
    base_name: str | None,
    endpoint_key_variable: str | None,
    model: str | None,
    prompts: Path | None,
    new_tokens: int,
    device: str,
    vllm: str,
    base_gguf: Path | None,
    graph: Path | None,
    timeout_s: float,
    start_timeout_s: float,
    output: Path | None,
    as_json: bool,
) -> int:
    """Verify that engines answer as an adapter was trained, and name the likely fault if one does not.

    ADAPTER is a LoRA-Over checkpoint or any plain PEFT LoRA of a causal language model. An engine gets it in the form
    that it needs, and answers the same prompts as PyTorch. Its distance from PyTorch on the base model is its noise.

    Words after -- are passed to `vllm serve`, except options that this command sets itself.

    Exit code 0: as trained; 1: an engine differs; 3: inconclusive, since the adapter moves the answers less than the
    noise; 2: unusable request, or an engine that failed.
    """
    from loraover.common.command_line import quiet_libraries
    from loraover.reporting.reporter import ConsoleReporter
    from loraover_serve.comparison.report import UnwrittenReportError
    from loraover_serve.verify.run import verify_adapter

    quiet_libraries()
    try:
        report = verify_adapter(
            adapter,
            engines=engines,
            endpoint=endpoint,
            served_name=served_name,
            base_name=base_name,
            endpoint_key_variable=endpoint_key_variable,
            model=model,
            prompts=prompts,
            new_tokens=new_tokens,
            device=device,
            vllm=vllm,
            base_gguf=base_gguf,
            graph=graph,
            timeout_s=timeout_s,
            start_timeout_s=start_timeout_s,
            output=output,
            options=options,
            report=ConsoleReporter(),
        )
    except UnwrittenReportError as error:
        _show(error.report, as_json)
        raise
    _show(report, as_json)
    if output is not None:
        click.echo(f"wrote {output}", err=as_json)
    return report.exit_code


def _show(report: VerifyReport, as_json: bool) -> None:
    from rich.console import Console

    from loraover_serve.verify.show import show_report

    show_report(report, Console(stderr=as_json))
    if as_json:
        print(report.model_dump_json(indent=1))
