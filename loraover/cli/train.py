"""The command `loraover train`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loraover.reporting.request_command import request_command
from loraover.training.request import TrainRequest

if TYPE_CHECKING:
    from rich.console import Console

    from loraover.training.recipe import Recipe


def _run(request: TrainRequest, as_json: bool) -> None:
    from rich.console import Console

    from loraover.common.command_line import quiet_libraries
    from loraover.training.recipe import load_recipe

    recipe = load_recipe(request.recipe, request.overrides)
    quiet_libraries()
    (_plan if request.plan else _train)(request, recipe, Console(stderr=as_json), as_json)


def _plan(request: TrainRequest, recipe: Recipe, console: Console, as_json: bool) -> None:
    from loraover.reporting.reporter import ConsoleReporter
    from loraover.training.plan import make_plan
    from loraover.training.show import show_plan

    found = make_plan(recipe, ConsoleReporter(console), tries=True)
    if as_json:
        print(found.model_dump_json(indent=1))
    else:
        show_plan(found, console)


def _train(request: TrainRequest, recipe: Recipe, console: Console, as_json: bool) -> None:
    from dataclasses import replace
    from pathlib import Path

    from loraover.reporting.reporter import ConsoleReporter
    from loraover.training.run import train
    from loraover.training.run_folder import RECIPE_FILE, new_run_folder, newest_unfinished, product

    report, name = ConsoleReporter(console), request.recipe or Path(request.data or "run").name
    folder = request.output or (newest_unfinished(name) if request.resume else new_run_folder(name))
    if request.output is None:
        report.line(f"run: {folder}")
    try:
        result = train(
            recipe, folder, resume=request.resume, report=report, command=request.command(), record=request.record
        )
    except KeyboardInterrupt:
        if folder.exists() and recipe.can_resume:
            again = f"{replace(request, output=folder).command()} --resume"
            click.echo(f"To continue from the last complete checkpoint: {again}", err=True)
        raise
    if request.recipe is None:
        report.line(f"recipe: {folder / RECIPE_FILE}")
    made = product(recipe, folder)
    report.line(f"{made.name}: {made}")
    if as_json:
        print(result.model_dump_json(indent=1))


train = request_command(TrainRequest, _run)
