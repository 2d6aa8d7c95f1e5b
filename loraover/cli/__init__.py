"""The command `loraover`; each of its commands is a file here."""

from __future__ import annotations

import click

from loraover.common.command_line import LazyGroup, entry_point

COMMANDS = {
    "train": "loraover.cli.train:train",
    "compare": "loraover.cli.compare:compare",
    "schedule": "loraover.cli.schedule:schedule",
    "study": "loraover.cli.study:study",
    "eval": "loraover.cli.evaluate:evaluate_command",
}


@click.group(cls=LazyGroup, commands_at=COMMANDS, plugins="loraover.commands")
@click.version_option(package_name="loraover")
def cli() -> None:
    """Train LoRA adapters with more capacity, ship plain LoRA."""


main = entry_point(cli)
