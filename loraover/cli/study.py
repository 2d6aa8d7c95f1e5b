"""The command `loraover study`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from loraover.common.command_line import Command


@click.command(
    cls=Command,
    examples=[
        "loraover study gsm8k-smollm2 --lr-sweep 3e-4,1e-3,3e-3 --seeds 5 -o study",
        "loraover study demo --methods lora,lora-over --lr-sweep lora=1e-3,3e-3 --lr-sweep 3e-4,1e-3 -o study",
    ],
)
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True)
@click.option(
    "--methods",
    help="Methods to compare, separated by commas, see docs/study/. Default: plain LoRA, plain LoRA with as many "
    "trained numbers as LoRA-Over, LoRA-Over of all matrices, and of a quarter of them chosen by score and by chance.",
)
@click.option(
    "--ruler",
    "rulers",
    multiple=True,
    metavar="METHOD",
    help="Method to show for scale, such as lora:r=16. It is not a baseline and does not count in the verdict. Can be "
    "repeated.",
)
@click.option(
    "--lr-sweep",
    "sweeps",
    multiple=True,
    metavar="[NAME=]RATES",
    default=["3e-4,1e-3,3e-3"],
    show_default=True,
    help="Learning rates to try, separated by commas. NAME limits them to one method (lora), one task (a recipe's "
    "name) or one method on one task (demo/lora). Rates without NAME apply to all others. Can be repeated.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Number of seeds, which are 0, 1, 2 and so on.",
)
@click.option(
    "--tuning-seeds",
    type=click.IntRange(1),
    help="Number of seeds that choose each method's rate; the others are trained at the chosen one only. Default: all.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the study: new, or one to continue.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Value of a recipe key for all runs, such as training.max_steps=60. Can be repeated.",
)
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Number of runs at the same time.")
@click.option("--ray", help="Address of a Ray cluster for the runs, or 'local' for one on this machine.")
@click.option(
    "--reuse",
    multiple=True,
    metavar="STUDY",
    type=click.Path(path_type=Path),
    help="Folder of another study, whose finished runs with the same recipe count as runs of this one. Can be "
    "repeated.",
)
@click.option("--report-only", is_flag=True, help="Judge the runs that are finished, and train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def study(
    recipes: tuple[str, ...],
    methods: str | None,
    rulers: tuple[str, ...],
    sweeps: tuple[str, ...],
    seeds: int,
    tuning_seeds: int | None,
    output: Path,
    settings: tuple[str, ...],
    jobs: int,
    ray: str | None,
    reuse: tuple[Path, ...],
    report_only: bool,
    as_json: bool,
) -> None:
    """Train RECIPEs with several methods, learning rates and seeds, and compare the methods at their best rates.

    Finished runs are kept: the same command continues a study that was stopped.
    """
    from rich.console import Console

    from loraover.common.command_line import quiet_libraries

    quiet_libraries()
    from loraover.reporting.reporter import ConsoleReporter
    from loraover.study.grid import DEFAULT_METHODS, split_outside_brackets
    from loraover.study.runner import run_study
    from loraover.study.show import show_study
    from loraover.training.recipe import parse_override

    console = Console(stderr=as_json)
    report = run_study(
        recipes,
        output,
        methods=DEFAULT_METHODS if methods is None else split_outside_brackets(methods, ","),
        lr_sweep=_sweeps(sweeps),
        seeds=seeds,
        tuning_seeds=tuning_seeds,
        rulers=rulers,
        settings=dict(parse_override(setting) for setting in settings),
        jobs=jobs,
        ray=ray,
        reuse=reuse,
        report_only=report_only,
        report=ConsoleReporter(console),
        command=shlex.join(["loraover", *sys.argv[1:]]),
    )
    show_study(report, output, console)
    if as_json:
        print(report.model_dump_json(indent=1))


def _sweeps(sweeps: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    """Learning rates by name; those without a name are under the empty one."""
    parts = [(name, _rates(text)) for name, _, text in (sweep.rpartition("=") for sweep in sweeps)]
    if len(dict(parts)) < len(parts):
        raise click.UsageError("--lr-sweep gives two sweeps to one name, or two without a name.")
    return dict(parts)


def _rates(text: str) -> tuple[float, ...]:
    from loraover.study.request import EXAMPLE

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise click.UsageError(f"--lr-sweep {text!r}: {EXAMPLE}") from error
