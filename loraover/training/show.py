"""Tables of runs, plans and recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console

from loraover.common.errors import printable
from loraover.reporting.reporter import print_line, print_rows
from loraover.reporting.table import Column, Table
from loraover.training.run_result import RunResult

if TYPE_CHECKING:
    from loraover.training.plan import TrainingPlan


def show_runs(results: Mapping[str, RunResult], console: Console) -> None:
    """Print a line for each value that all runs share, then a table of the others with one column for each run."""
    facts = {run: result.facts() for run, result in results.items()}
    names = dict.fromkeys(name for found in facts.values() for name in found)
    common = {name: {found.get(name, "") for found in facts.values()} for name in names}
    shared = [name for name in names if len(facts) > 1 and len(common[name]) == 1]
    for name in shared:
        console.print(printable(f"{name}: {common[name].pop()}"), markup=False, highlight=False)

    def column(run: str) -> Column[str]:
        return Column(run, lambda name: facts[run].get(name, "-"), "name")

    rows = [name for name in names if name not in shared]
    console.print(Table([Column("", lambda name: name, "name"), *map(column, facts)], rows))


def show_plan(plan: TrainingPlan, console: Console) -> None:
    """Print what a run would need, and what the estimate assumes."""
    from loraover.training.plan import ASSUMPTION

    print_rows(console, list(plan.facts().items()))
    print_line(console, ASSUMPTION)
