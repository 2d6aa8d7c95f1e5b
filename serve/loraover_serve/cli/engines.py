"""The command `loraover-serve engines`."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def engines(as_json: bool) -> None:
    """Show which engines this environment can run a folded adapter on."""
    from loraover_serve.engines.installed import find_engines

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
