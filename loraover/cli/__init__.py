"""The command `loraover`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraover.common.command_line import entry_point
from loraover.evaluation import TASKS

if TYPE_CHECKING:
    from loraover.training.recipe import Recipe


@click.group()
@click.version_option(package_name="loraover")
def cli() -> None:
    """Train LoRA adapters with more capacity, ship plain LoRA."""


@cli.command()
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
    from loraover.reporting.reporter import Reporter
    from loraover.training.run import product
    from loraover.training.run import train as run

    console = Console(stderr=as_json)
    typed = shlex.join(["loraover", *(word for word in sys.argv[1:] if word != "--resume")])  # also runs from the start
    try:
        result = run(loaded, output, resume=resume, report=Reporter(console), command=typed)
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


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def compare(runs: tuple[Path, ...], as_json: bool) -> None:
    """Show finished RUNS side by side."""
    import json

    from loraover.training.run_result import read_run

    results = {str(run): read_run(run) for run in runs}
    if as_json:
        print(json.dumps({run: result.model_dump(mode="json") for run, result in results.items()}, indent=1))
        return
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE)
    table.add_column("")
    for run in results:
        table.add_column(escape(run), overflow="fold")
    for name in dict.fromkeys(name for result in results.values() for name in result.facts()):
        table.add_row(name, *(escape(result.facts().get(name, "")) for result in results.values()))
    Console().print(table)


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Write the map and the scores to a new .svg or .png file."
)
@click.option("--json", "as_json", is_flag=True, help="Print every decision with all scores as JSON.")
def schedule(checkpoint: Path, plot: Path | None, as_json: bool) -> None:
    """Show which matrices of CHECKPOINT were over-parameterised, when, and by which scores."""
    import json

    from rich.console import Console

    from loraover.checkpoint.checkpoint import read_checkpoint
    from loraover.reporting.schedule_map import plot_schedule, show_schedule

    meta = read_checkpoint(checkpoint).meta
    if plot is not None:
        plot_schedule(meta, plot)
    if as_json:
        print(json.dumps([found.model_dump(mode="json") for found in meta.rounds], indent=1))
    else:
        show_schedule(meta, Console())


@cli.command()
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
    from loraover.reporting.reporter import Reporter
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
    report = run_study(request, output, None if report_only else Where(jobs, ray), Reporter(console))
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


@cli.command("eval")
@click.argument("model")
@click.option("--task", required=True, type=click.Choice(list(TASKS)), help="See docs/evaluation.md.")
@click.option("--adapter", "adapters", multiple=True, type=click.Path(path_type=Path), help="Beside the base model.")
@click.option("--data", help="Questions: JSONL file, folder or hub name; absent: the hub's.")
@click.option("--examples", type=click.IntRange(1), help="Number of questions, the first ones.")
@click.option("--endpoint", "endpoint_url", help="Ask an OpenAI-compatible server, such as vLLM, instead of PyTorch.")
@click.option("--endpoint-model", "served", multiple=True, help="Name at the endpoint, the base model's first.")
@click.option("--endpoint-key-variable", help="Environment variable that holds the endpoint's key.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Questions at a time.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(1), help="Of an answer; absent: the task's.")
@click.option("--chat/--no-chat", default=None, help="Chat template around questions; absent: if there is one.")
@click.option("--allow-code-execution", is_flag=True, help="Run generated code, in a sandbox.")
@click.option("--judge-url", help="OpenAI-compatible server of the judge.")
@click.option("--judge-model", help="The judge's name there.")
@click.option("--judge-key-variable", help="Environment variable that holds the judge's key.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON file; finished models in it are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def evaluate_command(
    model: str,
    task: str,
    adapters: tuple[Path, ...],
    data: str | None,
    examples: int | None,
    endpoint_url: str | None,
    served: tuple[str, ...],
    endpoint_key_variable: str | None,
    batch_size: int,
    dtype: str,
    max_new_tokens: int | None,
    chat: bool | None,
    allow_code_execution: bool,
    judge_url: str | None,
    judge_model: str | None,
    judge_key_variable: str | None,
    output: Path | None,
    as_json: bool,
) -> int:
    """Put a benchmark's questions to MODEL, a folder or hub name, and to its adapters."""
    from rich.console import Console

    from loraover.common.command_line import quiet_libraries
    from loraover.evaluation.base import Options
    from loraover.evaluation.endpoint import Endpoint
    from loraover.evaluation.judge import Judge

    if (judge_url is None) != (judge_model is None):
        raise click.UsageError("--judge-url and --judge-model go together.")
    judge = None
    if judge_url is not None and judge_model is not None:
        judge = Judge(Endpoint(judge_url, judge_key_variable), judge_model)
    endpoint = None if endpoint_url is None else Endpoint(endpoint_url, endpoint_key_variable)
    options = Options(data, examples, max_new_tokens, chat, allow_code_execution, judge)
    quiet_libraries()
    from loraover.evaluation.run import Request, evaluate
    from loraover.reporting.reporter import Reporter

    request = Request(
        task=task,
        model=model,
        options=options,
        adapters=adapters,
        endpoint=endpoint,
        served=served,
        dtype=dtype,
        batch_size=batch_size,
        command=shlex.join(["loraover", *sys.argv[1:]]),
    )
    found = evaluate(request, output, Reporter(Console(stderr=as_json)))
    if as_json:
        print(found.model_dump_json(indent=1))
    return int(any(result.failure for result in found.results))


main = entry_point(cli)

if __name__ == "__main__":
    main()
