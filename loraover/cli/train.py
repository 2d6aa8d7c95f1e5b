"""The command `loraover train`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from loraover.reporting.request_command import request_command
from loraover.training.request import TrainRequest

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from loraover.training.recipe import Recipe


def _run(request: TrainRequest, as_json: bool) -> None:
    from rich.console import Console

    from loraover.common.command_line import quiet_libraries
    from loraover.common.errors import ConfigError
    from loraover.common.ranks import launched
    from loraover.training.recipe import load_recipe

    if request.ray is not None and (request.plan or "RANK" in os.environ):
        raise ConfigError(
            f"{request.named('ray')} gives a run to Ray, which starts its processes: give the command without "
            f"{request.named('plan') if request.plan else 'a launcher'}."
        )
    with launched().together():
        recipe = load_recipe(request.recipe, request.overrides)
        launched().meet()
        quiet_libraries()
        (_plan if request.plan else _train)(request, recipe, Console(stderr=as_json), as_json)


def _plan(request: TrainRequest, recipe: Recipe, console: Console, as_json: bool) -> None:
    from loraover.common.atomic_output import publish_text
    from loraover.common.ranks import launched
    from loraover.reporting.html_page import check_new
    from loraover.reporting.reporter import ConsoleReporter, print_line, print_rows
    from loraover.training.plan import ASSUMPTION, make_plan, to_page

    ranks = launched()
    if request.html is not None:
        ranks.write(check_new, request.html, ".html")  # before anything is tried
    gpus: Any = {"gpus": request.gpus, "gpu_memory": request.gpu_memory}
    found = make_plan(recipe, ranks.heard(ConsoleReporter(console)), tries=ranks.size == 1, **gpus)
    if request.html is not None:
        ranks.write(publish_text, request.html, to_page(found, request.command()).html)
    if as_json:
        ranks.write(print, found.model_dump_json(indent=1))
    else:
        ranks.write(print_rows, console, list(found.facts().items()))
        ranks.write(print_line, console, ASSUMPTION)


def _train(request: TrainRequest, recipe: Recipe, console: Console, as_json: bool) -> None:
    from dataclasses import replace
    from pathlib import Path

    from loraover.common.ranks import launched
    from loraover.reporting.reporter import ConsoleReporter
    from loraover.training.on_ray import train_on_ray
    from loraover.training.run.folder import RECIPE_FILE, product, run_folder
    from loraover.training.run.train import train

    ranks, name = launched(), request.recipe or Path(request.data or "run").name
    report = ranks.heard(ConsoleReporter(console))
    resume: Any = {None: False, "begun": True}.get(request.resume, request.resume)
    folder = request.output or Path(ranks.of_first(lambda: str(run_folder(name, resume=resume))))
    if request.output is None:
        report.line(f"run: {folder}")
    options = {"resume": resume, "report": report, "command": request.command(), "record": request.record}
    try:
        if request.ray is None:
            result = train(recipe, folder, **options)
        else:
            result = train_on_ray(recipe, folder, request.ray, request.workers or 1, **options)
    except KeyboardInterrupt:
        if folder.exists() and recipe.can_resume:
            again = f"{replace(request, output=folder).command()} --resume"
            ranks.write(click.echo, f"To continue from the last complete checkpoint: {again}", err=True)
        raise
    if request.recipe is None:
        report.line(f"recipe: {folder / RECIPE_FILE}")
    made = product(recipe, folder)
    report.line(f"{made.name}: {made}")
    if as_json:
        ranks.write(print, result.model_dump_json(indent=1))
    else:
        ranks.write(_show_next, folder, console)


def _show_next(folder: Path, console: Console) -> None:
    from loraover.inspection.folder import inspect_folder
    from loraover.inspection.show import show_next_steps

    show_next_steps(inspect_folder(folder), console)


train = request_command(TrainRequest, _run)
