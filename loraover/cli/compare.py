"""The command `loraover compare`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def compare(runs: tuple[Path, ...], as_json: bool) -> None:
    """Show finished RUNS side by side."""
    import json

    from loraover.training.run_result import read_run

    results = {str(run): read_run(run) for run in runs}
    if as_json:
        print(json.dumps({run: result.model_dump(mode="json") for run, result in results.items()}, indent=1))
        return
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE)
    table.add_column("")
    for run in results:
        table.add_column(escape(run), overflow="fold")
    for name in dict.fromkeys(name for result in results.values() for name in result.facts()):
        table.add_row(name, *(escape(result.facts().get(name, "")) for result in results.values()))
    Console().print(table)
