"""The command `loraover-serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from loraover.common.command_line import entry_point

PATH = click.Path(path_type=Path)
START_TIMEOUT = click.option(
    "--start-timeout",
    "start_timeout_s",
    type=click.FloatRange(1),
    default=600,
    show_default=True,
    help="Of a server until its first answers, s.",
)


class SplitAtDashes(click.Command):
    """Keeps what stands after "--" for another program, in the context's `obj`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        ctx.obj = tuple(args[end + 1 :])
        return super().parse_args(ctx, args[:end])


@click.group()
@click.version_option(package_name="loraover")
def cli() -> None:
    """Serve folded adapters and measure their parity with plain LoRA."""


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def engines(as_json: bool) -> None:
    """Show which engines this environment can run a folded adapter on."""
    from loraover_serve.engines.installed import find_engines

    found = find_engines()
    if as_json:
        print(json.dumps({engine.name: engine.version for engine in found}))
        return
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE)
    for column in ("engine", "version", "takes"):
        table.add_column(column)
    for engine in found:
        found_version = engine.version or f"not installed: pip install {engine.distributions[0]}"
        table.add_row(engine.name, found_version, engine.takes)
    Console().print(table)


@cli.command(cls=SplitAtDashes, options_metavar="[OPTIONS]")
@click.argument("adapters", metavar="ADAPTER... [-- VLLM OPTIONS]", nargs=-1, required=True, type=PATH)
@click.option("--model", help="Base model, folder or hub name, instead of the one that the adapters name.")
@click.option("--vllm", envvar="LORAOVER_VLLM", default="vllm", show_default=True, help="The command vllm.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address or name to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on; 8000 or the next free one otherwise.")
@click.option("--log", type=PATH, default=Path("vllm.log"), show_default=True, help="The server's output.")
@START_TIMEOUT
@click.pass_obj
def up(options: tuple[str, ...], /, **request: Any) -> None:
    """Start vLLM with ADAPTERs, as `loraover-export vllm` writes them, and print a request that works.

    Adapters that vLLM refuses, or would serve wrongly without a message, are refused before it starts. The server is
    ready when the base model and each adapter have answered. What stands after -- goes to vllm serve unchanged; what up
    sets itself, such as --port, is refused there. The server asks for the key in VLLM_API_KEY, if that is set.
    Ctrl-C, SIGTERM and SIGHUP stop the server.
    """
    from loraover_serve.vllm.up import UpRequest, serve_until_stopped

    serve_until_stopped(UpRequest(options=options, **request))


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"{value!r} is no list of positive numbers such as 1,4,16.")
    return numbers


@cli.command(cls=SplitAtDashes, options_metavar="[OPTIONS] [-- VLLM OPTIONS]")
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


main = entry_point(cli)

if __name__ == "__main__":
    main()
