"""Options that several commands of `loraover-serve` take."""

from __future__ import annotations

from pathlib import Path

import click

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
