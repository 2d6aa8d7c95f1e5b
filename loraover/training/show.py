"""Tables of runs, plans and recipes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loraover.training.run_result import RunResult

if TYPE_CHECKING:
    from loraover.training.plan import Plan
    from loraover.training.recipe import Recipe


def show_runs(results: Mapping[str, RunResult], console: Console) -> None:
    """Print one column for each run, by the run's name."""
    table = Table(box=SIMPLE)
    table.add_column("")
    for run in results:
        table.add_column(escape(run), overflow="fold")
    for name in dict.fromkeys(name for result in results.values() for name in result.facts()):
        table.add_row(name, *(escape(result.facts().get(name, "")) for result in results.values()))
    console.print(table)


def show_plan(plan: Plan, console: Console) -> None:
    """Print what a run would need, and what the estimate assumes."""
    from loraover.training.plan import ASSUMPTION

    for line in (*(f"{name:<18}{value}" for name, value in plan.facts().items()), ASSUMPTION):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def show_recipes(recipes: Iterable[tuple[str, Recipe]], console: Console) -> None:
    """Print name, base model, training data and description of each recipe."""
    table = Table(box=SIMPLE)
    for column in ("recipe", "base model", "data"):
        table.add_column(column, no_wrap=True)
    table.add_column("description", ratio=1)
    for name, recipe in recipes:
        table.add_row(*map(escape, (name, recipe.model, recipe.data.train, recipe.description)))
        table.add_row()
    console.print(table)
