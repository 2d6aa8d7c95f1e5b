"""The command `loraover compare`."""

from __future__ import annotations

from pathlib import Path

import click

from loraover.common.command_line import Command


@click.command(cls=Command, examples=["loraover compare runs/demo-1 runs/demo-2"])
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def compare(runs: tuple[Path, ...], as_json: bool) -> None:
    """Show finished runs side by side: method, data, parameters, losses. Each RUN is a folder of `loraover train`."""
    import json

    from loraover.training.run_result import read_run

    results = {str(run): read_run(run) for run in runs}
    if as_json:
        print(json.dumps({run: result.model_dump(mode="json") for run, result in results.items()}, indent=1))
        return
    from rich.console import Console

    from loraover.training.show import show_runs

    show_runs(results, Console())
