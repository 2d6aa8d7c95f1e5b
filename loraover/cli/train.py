"""The command `loraover train`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from loraover.training.recipe import Recipe


@click.command()
@click.argument("recipe")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="New folder for the run.")
@click.option(
    "--method", type=click.Choice(["lora", "lora-over", "full"]), help="Plain LoRA, LoRA-Over, or all weights."
)
@click.option("--model", help="Base model: folder or hub name.")
@click.option("--data", help="Training data: JSONL file, folder, hub name or 'word-problems'.")
@click.option("--test-data", help="Held-out data, likewise.")
@click.option("--steps", type=int, help="Optimizer steps, in place of epochs.")
@click.option("--learning-rate", type=float)
@click.option("--seed", type=int)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other key, e.g. over.decomposition=svd."
)
@click.option("--base", help="Base model that a pushed adapter names in place of the stand-in that it was trained on.")
@click.option("--resume", is_flag=True, help="Continue the run in OUTPUT from its last whole checkpoint.")
@click.option("--plan", is_flag=True, help="Say what the run would take, and do nothing: no weights are read.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train(
    recipe: str,
    output: Path | None,
    method: str | None,
    model: str | None,
    data: str | None,
    test_data: str | None,
    steps: int | None,
    learning_rate: float | None,
    seed: int | None,
    settings: tuple[str, ...],
    base: str | None,
    resume: bool,
    plan: bool,
    as_json: bool,
) -> None:
    """Train an adapter as RECIPE says: the name of a recipe that ships, or a YAML file."""
    if output is None and not plan:
        raise click.UsageError("give the folder for the run with -o, or --plan.")
    from rich.console import Console

    from loraover.common.command_line import quiet_libraries
    from loraover.training.recipe import load_recipe, parse_override

    named = {
        "method": method,
        "model": model,
        "data.train": data,
        "data.test": test_data,
        "training.max_steps": steps,
        "training.learning_rate": learning_rate,
        "training.seed": seed,
        "push_base": base,
    }
    overrides: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    if steps is not None:
        overrides["training.num_train_epochs"] = None
    overrides |= dict(parse_override(setting) for setting in settings)
    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    if plan:
        _show_plan(loaded, as_json)
        return
    assert output is not None
    from loraover.reporting.reporter import ConsoleReporter
    from loraover.training.run import product
    from loraover.training.run import train as run

    console = Console(stderr=as_json)
    typed = shlex.join(["loraover", *(word for word in sys.argv[1:] if word != "--resume")])  # also runs from the start
    try:
        result = run(loaded, output, resume=resume, report=ConsoleReporter(console), command=typed)
    except KeyboardInterrupt:
        if output.exists():
            click.echo("to go on from the last whole checkpoint, run the same command with --resume", err=True)
        raise
    made = product(loaded, output)
    console.print(f"{made.name}: {made}", soft_wrap=True, markup=False)
    if as_json:
        print(result.model_dump_json(indent=1))


def _show_plan(recipe: Recipe, as_json: bool) -> None:
    from loraover.training.plan import ASSUMPTION, make_plan

    found = make_plan(recipe)
    if as_json:
        print(found.model_dump_json(indent=1))
        return
    for name, value in found.facts().items():
        click.echo(f"{name:<18}{value}")
    click.echo(ASSUMPTION)
