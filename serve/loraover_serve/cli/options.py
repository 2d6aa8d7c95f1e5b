"""Options that several commands of `loraover-serve` take."""

from __future__ import annotations

from pathlib import Path

import click

from loraover.common.command_line import Command

PATH = click.Path(path_type=Path)

MODEL = click.option("--model", show_default="the one that the adapters name", help="Base model, folder or hub name.")
VLLM = click.option(
    "--vllm",
    envvar="LORAOVER_VLLM",
    show_envvar=True,
    default="vllm",
    show_default=True,
    help="Command that starts vLLM, in any environment.",
)
GRAPH = click.option(
    "--graph",
    type=PATH,
    show_default="graphs that are built for the run",
    help="Folder of an earlier swappable ONNX export, whose graph ONNX Runtime runs with the adapters.",
)
START_TIMEOUT = click.option(
    "--start-timeout",
    "start_timeout_s",
    type=click.FloatRange(1),
    default=600,
    show_default=True,
    help="Seconds that an engine may take until its first answers.",
)


class SplitAtDashes(Command):
    """A command that keeps the words after "--" for another program, in the context's `obj`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        ctx.obj = tuple(args[end + 1 :])
        return super().parse_args(ctx, args[:end])
