"""The command `loraover train`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from loraover.common.command_line import Command


@click.command(
    cls=Command,
    examples=[
        "loraover train demo",
        "loraover train gsm8k-smollm2 --method lora --learning-rate 1e-3 -o runs/plain",
        "loraover train demo --set over.decomposition=svd --set over.options={} --plan",
        "loraover train demo --resume",
    ],
    renamed={"--base": "--push-model"},
)
@click.argument("recipe")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="New folder for the run. Default: runs/RECIPE-N with the first free number N; with --resume, the newest "
    "unfinished run of the recipe there.",
)
@click.option(
    "--method",
    type=click.Choice(["lora", "lora-over", "full", "soma", "lorasc", "federated", "tensorguide"]),
    help="Method in place of the recipe's: lora, lora-over, full (all weights), or one of docs/research/methods.md.",
)
@click.option("--model", help="Base model: folder or hub name.")
@click.option("--data", help="Training data: JSONL file, folder, hub name, or 'word-problems' (built in).")
@click.option("--test-data", help="Held-out data: JSONL file, folder, hub name, or 'word-problems' (built in).")
@click.option("--steps", type=int, help="Number of optimizer steps, in place of the recipe's steps or epochs.")
@click.option("--learning-rate", type=float, help="Peak learning rate.")
@click.option("--seed", type=int, help="Seed of weights, data order and built-in data.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Value of any other key of the recipe, such as training.weight_decay=0.01. Can be repeated.",
)
@click.option(
    "--push-model", help="Base model that an adapter names on the hub, if it was trained on a local copy of that model."
)
@click.option("--resume", is_flag=True, help="Continue the run in the output folder from its last complete checkpoint.")
@click.option("--plan", is_flag=True, help="Print memory, steps and tokens that the run would need, and train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result, or the plan, as JSON.")
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
    push_model: str | None,
    resume: bool,
    plan: bool,
    as_json: bool,
) -> None:
    """Train an adapter as RECIPE says: the name of a recipe that ships (see `loraover recipes`), or a YAML file."""
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
        "push_model": push_model,
    }
    overrides: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    if steps is not None:
        overrides["training.num_train_epochs"] = None
    overrides |= dict(parse_override(setting) for setting in settings)
    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    console = Console(stderr=as_json)
    if plan:
        from loraover.training.plan import make_plan
        from loraover.training.show import show_plan

        found = make_plan(loaded)
        if as_json:
            print(found.model_dump_json(indent=1))
        else:
            show_plan(found, console)
        return
    from loraover.reporting.reporter import ConsoleReporter
    from loraover.training.run import train as run
    from loraover.training.run_folder import new_run_folder, newest_unfinished, product

    words = [word for word in sys.argv[1:] if word != "--resume"]  # the card's command runs from the start
    typed = shlex.join(["loraover", *words])
    report = ConsoleReporter(console)
    folder = output or (newest_unfinished(recipe) if resume else new_run_folder(recipe))
    if output is None:
        report.line(f"run: {folder}")
    try:
        result = run(loaded, folder, resume=resume, report=report, command=typed)
    except KeyboardInterrupt:
        if folder.exists() and loaded.can_resume:
            again = [*words, "--resume", *(() if output is not None else ("-o", str(folder)))]
            click.echo(f"To continue from the last complete checkpoint: {shlex.join(['loraover', *again])}", err=True)
        raise
    made = product(loaded, folder)
    report.line(f"{made.name}: {made}")
    if as_json:
        print(result.model_dump_json(indent=1))
