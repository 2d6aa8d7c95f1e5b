"""The command `loraover-serve`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from loraover.command import entry_point

PATH = click.Path(path_type=Path)


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
    from loraover_serve.engines import find_engines

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
@click.option("--port", type=click.IntRange(1, 65535), help="Of the loopback interface; a free one otherwise.")
@click.option("--log", type=PATH, default=Path("vllm.log"), show_default=True, help="The server's output.")
@click.pass_obj
def up(
    options: tuple[str, ...], adapters: tuple[Path, ...], model: str | None, vllm: str, port: int | None, log: Path
) -> None:
    """Start vLLM with ADAPTERs, as `loraover-export vllm` writes them, and print a request that works.

    It is ready when the base model and each adapter have answered. What stands after -- goes to vllm serve unchanged.
    """
    from loraover_serve.up import UpRequest, serve_until_stopped

    serve_until_stopped(UpRequest(adapters, model, vllm, port, log, options))


main = entry_point(cli)

if __name__ == "__main__":
    main()
