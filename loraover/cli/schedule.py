"""The command `loraover schedule`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Write the map and the scores to a new .svg or .png file."
)
@click.option("--json", "as_json", is_flag=True, help="Print every decision with all scores as JSON.")
def schedule(checkpoint: Path, plot: Path | None, as_json: bool) -> None:
    """Show which matrices of CHECKPOINT were over-parameterised, when, and by which scores."""
    import json

    from rich.console import Console

    from loraover.checkpoint.checkpoint import read_checkpoint
    from loraover.reporting.schedule_map import plot_schedule, show_schedule

    meta = read_checkpoint(checkpoint).meta
    if plot is not None:
        plot_schedule(meta, plot)
    if as_json:
        print(json.dumps([found.model_dump(mode="json") for found in meta.rounds], indent=1))
    else:
        show_schedule(meta, Console())
