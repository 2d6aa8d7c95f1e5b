"""The command `loraover-serve parity`."""

from __future__ import annotations

from typing import Any

import click

from loraover_serve.cli.options import PATH, START_TIMEOUT, SplitAtDashes


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"{value!r} is no list of positive numbers such as 1,4,16.")
    return numbers


@click.command(cls=SplitAtDashes, options_metavar="[OPTIONS] [-- VLLM OPTIONS]")
@click.option("--folded", type=PATH, required=True, help="The folded adapter.")
@click.option("--vanilla", type=PATH, help="A plain LoRA of the same ranks and targets; random weights otherwise.")
@click.option("--checkpoint", type=PATH, help="The LoRA-Over checkpoint, for the unfolded arm of torch.")
@click.option(
    "--engine",
    "engines",
    multiple=True,
    type=click.Choice(["vllm", "onnx", "torch"]),
    default=["onnx"],
    show_default=True,
    help="To measure on; several may be given.",
)
@click.option("--requests", type=click.IntRange(1), default=100, show_default=True, help="For every arm.")
@click.option("--concurrency", default="1", show_default=True, callback=_numbers, help="Requests at once, on vLLM.")
@click.option(
    "--margin", type=click.FloatRange(0, 1, min_open=True), default=0.05, show_default=True, help="That is equal."
)
@click.option("-o", "--out", type=PATH, help="New folder for parity.json and parity.html.")
@click.option("--model", help="Base model, folder or hub name, instead of the one that the adapter names.")
@click.option("--vllm", envvar="LORAOVER_VLLM", default="vllm", show_default=True, help="The command vllm.")
@click.option(
    "--workload",
    type=click.Choice(["fixed", "mixed", "file"]),
    default="fixed",
    show_default=True,
    help="One length, log-normal lengths, or the prompts of a file.",
)
@click.option("--prompts", type=PATH, help="Text file with one prompt a line.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=32, show_default=True, help="Of a prompt.")
@click.option("--new-tokens", type=click.IntRange(1), default=32, show_default=True, help="To generate.")
@click.option("--memory", type=click.IntRange(0), default=1, show_default=True, help="vLLM servers an arm, for memory.")
@click.option("--cross-check", is_flag=True, help="Run `vllm bench serve` against the same server, too.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(1), default=120, show_default=True, help="Of a silent server, s."
)
@START_TIMEOUT
@click.option("--seed", default=0, show_default=True, help="Of weights, lengths and order.")
@click.option("--allow-unequal", is_flag=True, help="Compare adapters of different ranks or targets.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, without the samples.")
@click.pass_obj
def parity(options: tuple[str, ...], /, as_json: bool, **request: Any) -> int:
    """Measure whether a folded adapter costs what a vanilla LoRA costs, and says what it should.

    What stands after -- goes to vllm serve; what parity sets itself, such as the prefix cache, is refused there.
    Exit code 0: equivalent; 1: different; 3: inconclusive; 2: unusable request, or an engine that failed.
    """
    from loraover_serve.parity.request import ParityRequest
    from loraover_serve.parity.run import run_parity

    return run_parity(ParityRequest(options=options, **request), as_json)
