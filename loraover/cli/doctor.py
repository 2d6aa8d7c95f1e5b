"""The command `loraover doctor`."""

from __future__ import annotations

import click

from loraover.common.command_line import Command


@click.command(cls=Command, examples=["loraover doctor", "loraover doctor --offline --json"])
@click.option("--offline", is_flag=True, help="Do not ask whether the Hugging Face hub can be reached.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def doctor(offline: bool, as_json: bool) -> None:
    """Show devices, versions and engines of this installation, what is missing, and how to get it."""
    from rich.console import Console

    from loraover.common.command_line import quiet_libraries

    quiet_libraries()
    from loraover.inspection.installation import check_installation
    from loraover.inspection.show import show_installation

    found = check_installation(offline=offline)
    if as_json:
        print(found.model_dump_json(indent=1))
    else:
        show_installation(found, Console())
