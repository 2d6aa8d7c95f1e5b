"""The command `loraover study`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click


@click.command()
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True)
@click.option(
    "--methods",
    help="Separated by commas, see docs/study/; absent: plain LoRA at two sizes, LoRA-Over of all matrices, and of a "
    "quarter of them chosen by score and by chance.",
)
@click.option(
    "--lr-sweep",
    "sweeps",
    multiple=True,
    metavar="[NAME=]RATES",
    default=["3e-4,1e-3,3e-3"],
    show_default=True,
    help="Learning rates of every method, of one, or of a task (a recipe's name), in place of its methods' own.",
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the study, new or begun."
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Recipe key for all runs.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Runs at the same time.")
@click.option("--ray", help="Address of a Ray cluster for the runs, or 'local'.")
@click.option("--report-only", is_flag=True, help="Judge what is finished; run nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def study(
    recipes: tuple[str, ...],
    methods: str | None,
    sweeps: tuple[str, ...],
    seeds: int,
    output: Path,
    settings: tuple[str, ...],
    jobs: int,
    ray: str | None,
    report_only: bool,
    as_json: bool,
) -> None:
    """Train RECIPEs with several methods, learning rates and seeds, and compare the methods, each at its best rate.

    Finished runs are kept: the same command goes on where it was stopped.
    """
    from rich.console import Console

    from loraover.common.command_line import quiet_libraries

    quiet_libraries()
    from loraover.reporting.reporter import ConsoleReporter
    from loraover.study.grid import DEFAULT_METHODS, split_outside_brackets
    from loraover.study.runner import StudyRequest, Where, run_study
    from loraover.training.recipe import parse_override

    compared = DEFAULT_METHODS if methods is None else split_outside_brackets(methods, ",")
    rates, task_rates = _sweeps(compared, [Path(recipe).stem for recipe in recipes], sweeps)
    request = StudyRequest(
        recipes=recipes,
        rates=rates,
        task_rates=task_rates,
        seeds=seeds,
        settings=dict(parse_override(setting) for setting in settings),
        command=shlex.join(["loraover", *sys.argv[1:]]),
    )
    console = Console(stderr=as_json)
    report = run_study(request, output, None if report_only else Where(jobs, ray), ConsoleReporter(console))
    if as_json:
        print(report.model_dump_json(indent=1))


def _sweeps(
    methods: Sequence[str], tasks: Sequence[str], sweeps: tuple[str, ...]
) -> tuple[dict[str, tuple[float, ...]], dict[str, tuple[float, ...]]]:
    """Learning rates by method: those of METHOD=RATES, else those without a name; and by task."""
    parts = [(name, _rates(text)) for name, _, text in (sweep.rpartition("=") for sweep in sweeps)]
    named = dict(parts)
    if len(named) < len(parts):
        raise click.UsageError("--lr-sweep gives two sweeps to one name, or two without a name.")
    if both := sorted({*methods} & {*tasks} & named.keys()):
        raise click.UsageError(f"--lr-sweep names {both[0]!r}, a method and a recipe; give the recipe another name.")
    common = named.pop("", ())
    if unknown := sorted(named.keys() - {*methods, *tasks}):
        raise click.UsageError(f"--lr-sweep names {unknown[0]!r}, which is none of --methods and no recipe's name.")
    by_method = {method: named.get(method, common) for method in methods}
    by_task = {task: named[task] for task in tasks if task in named}
    if len(by_task) < len(set(tasks)) and (missing := [method for method in methods if not by_method[method]]):
        raise click.UsageError(f"--lr-sweep says no rates of {missing[0]!r}.")
    return by_method, by_task


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < float("inf") for rate in rates) or len(set(rates)) < len(rates):
        raise click.UsageError(f"--lr-sweep {text!r}: expected different positive numbers such as 3e-4,1e-3,3e-3.")
    return rates
