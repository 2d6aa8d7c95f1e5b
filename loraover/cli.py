"""The command `loraover`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from loraover.command import entry_point


@click.group()
@click.version_option(package_name="loraover")
def cli() -> None:
    """Train LoRA adapters with more capacity, ship plain LoRA."""


@cli.command()
@click.argument("recipe")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New folder for the run.")
@click.option("--method", type=click.Choice(["lora", "lora-over"]), help="Plain LoRA, or LoRA-Over.")
@click.option("--model", help="Base model: folder or hub name.")
@click.option("--data", help="Training data: JSONL file, folder, hub name or 'word-problems'.")
@click.option("--test-data", help="Held-out data, likewise.")
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--learning-rate", type=float)
@click.option("--seed", type=int)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other key, e.g. over.decomposition=svd."
)
@click.option("--resume", is_flag=True, help="Continue the run in OUTPUT from its last whole checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train(
    recipe: str,
    output: Path,
    method: str | None,
    model: str | None,
    data: str | None,
    test_data: str | None,
    steps: int | None,
    learning_rate: float | None,
    seed: int | None,
    settings: tuple[str, ...],
    resume: bool,
    as_json: bool,
) -> None:
    """Train an adapter as RECIPE says: the name of a recipe that ships, or a YAML file."""
    from rich.console import Console

    from loraover.command import quiet_libraries
    from loraover.recipe import load_recipe, parse_override

    named = {
        "method": method,
        "model": model,
        "data.train": data,
        "data.test": test_data,
        "training.max_steps": steps,
        "training.learning_rate": learning_rate,
        "training.seed": seed,
    }
    overrides: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    overrides |= dict(parse_override(setting) for setting in settings)
    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    from loraover.progress import Reporter
    from loraover.train import train as run

    console = Console(stderr=as_json)
    typed = shlex.join(["loraover", *sys.argv[1:]])
    try:
        result = run(loaded, output, resume=resume, report=Reporter(console), command=typed)
    except KeyboardInterrupt:
        if output.exists():
            click.echo("to go on from the last whole checkpoint, run the same command with --resume", err=True)
        raise
    console.print(f"adapter: {output / 'adapter'}", soft_wrap=True, markup=False)
    if as_json:
        print(result.model_dump_json(indent=1))


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def compare(runs: tuple[Path, ...], as_json: bool) -> None:
    """Show finished RUNS side by side."""
    import json

    from loraover.run_result import read_run

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


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Write the map and the scores to a new .svg or .png file."
)
@click.option("--json", "as_json", is_flag=True, help="Print every decision with all scores as JSON.")
def schedule(checkpoint: Path, plot: Path | None, as_json: bool) -> None:
    """Show which matrices of CHECKPOINT were over-parameterised, when, and by which scores."""
    import json

    from rich.console import Console

    from loraover.checkpoint import read_checkpoint
    from loraover.schedule_map import plot_schedule, show_schedule

    meta = read_checkpoint(checkpoint).meta
    if plot is not None:
        plot_schedule(meta, plot)
    if as_json:
        print(json.dumps([found.model_dump(mode="json") for found in meta.rounds], indent=1))
    else:
        show_schedule(meta, Console())


main = entry_point(cli)

if __name__ == "__main__":
    main()
