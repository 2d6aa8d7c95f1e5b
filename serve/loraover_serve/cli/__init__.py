"""The command `loraover-serve`; each of its commands is a file here."""

from __future__ import annotations

import click

from loraover.common.command_line import LazyGroup, entry_point

COMMANDS = {
    "up": "loraover_serve.cli.up:up",
    "parity": "loraover_serve.cli.parity:parity",
}


@click.group(cls=LazyGroup, commands_at=COMMANDS, renamed={"engines": "loraover doctor"})
@click.version_option(package_name="loraover")
def cli() -> None:
    """Serve adapters with vLLM, and measure whether a folded adapter is as fast as a plain LoRA."""


main = entry_point(cli)
