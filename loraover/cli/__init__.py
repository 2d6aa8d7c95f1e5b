"""The command `loraover`; a command that does more than to report is a file here."""

from __future__ import annotations

import click

from loraover.common.command_line import LazyGroup, entry_point
from loraover.reporting.request_command import Reporting

COMMANDS = {
    "train": "loraover.cli.train:train",
    "inspect": "loraover.cli.inspect:inspect",
    "recipes": "loraover.cli.recipes:recipes",
    "doctor": Reporting(
        "loraover.inspection.request:DoctorRequest",
        "loraover.inspection.installation:check_installation",
        "loraover.inspection.installation:show_installation",
    ),
}
SHORTCUTS = {"check": "export", "judge-rollouts": "serve", "record": "serve", "verify": "serve"}
"""Commands of a group that can also be called without the group's name, with that group."""
EXAMPLES = [
    "loraover train demo --method lora-over -o runs/demo",
    "loraover export fold runs/demo/adapter -o folded --check-error",
    "loraover export vllm folded -o for-vllm",
    "loraover serve up for-vllm",
    "loraover verify folded --engine vllm",
]


@click.group(
    "loraover",
    cls=LazyGroup,
    commands_at=COMMANDS,
    plugins="loraover.commands",
    shortcuts=SHORTCUTS,
    examples=EXAMPLES,
)
@click.version_option(package_name="loraover")
def cli() -> None:
    """Train LoRA adapters with extra parameters during training, and ship plain LoRA."""


main = entry_point(cli)
