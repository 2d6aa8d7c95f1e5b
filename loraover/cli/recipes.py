"""The command `loraover recipes`."""

from __future__ import annotations

import click

from loraover.common.command_line import Command


@click.command(
    cls=Command, examples=["loraover recipes", "loraover recipes demo > my-recipe.yaml", "loraover recipes --json"]
)
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print every value, defaults included, as JSON.")
def recipes(name: str | None, as_json: bool) -> None:
    """List the recipes that ship, or print the recipe NAME as YAML. A recipe holds the settings of one training run."""
    import json

    from loraover.training.recipe import load_recipe, recipe_names, recipe_text

    if name is not None and not as_json:
        click.echo(recipe_text(name), nl=False)
        return
    names = recipe_names() if name is None else [name]
    loaded = {one: load_recipe(one) for one in names}
    if as_json:
        click.echo(json.dumps({one: recipe.model_dump(mode="json") for one, recipe in loaded.items()}, indent=1))
        return
    from rich.console import Console

    from loraover.training.show import show_recipes

    show_recipes(loaded.items(), Console())
