"""The command `loraover-serve`; each of its commands is a file here."""

from __future__ import annotations

import click

from loraover.common.command_line import LazyGroup, entry_point

COMMANDS = {
    "up": "loraover_serve.cli.up:up",
    "parity": "loraover_serve.cli.parity:parity",
    "verify": "loraover_serve.cli.verify:verify",
}
EXAMPLES = [
    "loraover serve up for-vllm",
    "loraover serve verify runs/demo/adapter --engine onnx --engine torch -o verified",
    "loraover serve parity --adapter folded --baseline plain-lora -o parity",
]


@click.group(cls=LazyGroup, commands_at=COMMANDS, examples=EXAMPLES)
@click.version_option(package_name="loraover")
def cli() -> None:
    """Serve adapters with vLLM, verify that engines answer as they were trained, and measure how fast they are."""


main = entry_point(cli)
