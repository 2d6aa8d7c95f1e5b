"""The command `loraover recipes`."""

from __future__ import annotations

from dataclasses import dataclass

import click

from loraover.common.request import Request, argument
from loraover.reporting.request_command import request_command


@dataclass(frozen=True)
class RecipesRequest(Request):
    """List the recipes that ship, or print the recipe NAME as YAML.

    A recipe holds the settings of one training run.
    """

    verb = "loraover recipes"
    examples = (
        "loraover recipes",
        "loraover recipes demo > my-recipe.yaml",
        "loraover recipes --json",
    )
    json_help = "Print every value, defaults included, as JSON."

    name: str | None = argument("Name of the recipe to print.", default=None)


def _recipes(request: RecipesRequest, as_json: bool) -> None:
    import json

    from loraover.training.recipe import load_recipe, recipe_names, recipe_text

    if request.name is not None and not as_json:
        click.echo(recipe_text(request.name), nl=False)
        return
    names = recipe_names() if request.name is None else [request.name]
    loaded = {one: load_recipe(one) for one in names}
    if as_json:
        click.echo(json.dumps({one: recipe.model_dump(mode="json") for one, recipe in loaded.items()}, indent=1))
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    for name, recipe in loaded.items():
        console.print(name, style="bold", markup=False, highlight=False)
        for text in (f"base model: {recipe.model}", f"data: {recipe.data.name}", recipe.description):
            console.print(Padding(Text(text), (0, 0, 0, 2)))


recipes = request_command(RecipesRequest, _recipes)
