"""The command `loraover serve parity`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraover_export.cli.options import compute_dtype_option, device_option
from loraover_serve.cli.options import GRAPH, MODEL, PATH, START_TIMEOUT, VLLM, SplitAtDashes
from loraover_serve.engines import ENGINES

if TYPE_CHECKING:
    from loraover_serve.parity.measure.workload import WorkloadKind
    from loraover_serve.parity.report.parity_report import ParityReport


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"{value!r}, expected positive numbers such as 1,4,16.")
    return numbers


@click.command(
    cls=SplitAtDashes,
    options_metavar="[OPTIONS] [-- VLLM OPTIONS]",
    examples=[
        "loraover serve parity --adapter folded --checkpoint runs/a/adapter -o parity",
        "loraover serve parity --adapter shop --also-adapter news --engine vllm --max-concurrency 4 --num-prompts 200",
        "loraover serve parity --adapter for-vllm --engine vllm --max-concurrency 1,4 --num-prompts 200 -o parity",
    ],
    renamed={
        "--folded": "--adapter",
        "--vanilla": "--baseline",
        "--requests": "--num-prompts",
        "--concurrency": "--max-concurrency",
        "--out": "-o/--output",
    },
)
@click.option("--adapter", type=PATH, required=True, help="Folder of the folded adapter.")
@click.option(
    "--baseline",
    type=PATH,
    show_default="random weights of the adapter's shapes",
    help="Folder of a plain LoRA with the same ranks and targets, to compare with.",
)
@click.option(
    "--checkpoint",
    type=PATH,
    help="Folder of the LoRA-Over checkpoint that was folded; answers are then compared with its unfolded model.",
)
@click.option(
    "--also-adapter",
    "also_adapters",
    type=PATH,
    multiple=True,
    help="Folder of a further adapter, to measure requests that switch among adapters or share a batch; repeatable.",
)
@click.option(
    "--engine",
    "engines",
    multiple=True,
    type=click.Choice(ENGINES),
    default=["onnx"],
    show_default=True,
    help="Engine to measure on; repeat the option for several.",
)
@click.option(
    "--num-prompts",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Number of requests that each adapter answers, at every concurrency.",
)
@click.option(
    "--max-concurrency",
    default="1",
    show_default=True,
    callback=_numbers,
    help="Number of simultaneous requests to vLLM; with commas, one measurement for each number.",
)
@click.option(
    "--margin",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.05,
    show_default=True,
    help="Largest difference of times that still counts as equal (0.05 is 5 %).",
)
@click.option("-o", "--output", type=PATH, help="New folder for parity.json, parity.html and vLLM's logs.")
@MODEL
@VLLM
@GRAPH
@click.option(
    "--workload",
    type=click.Choice(["fixed", "mixed", "file"]),
    default="fixed",
    show_default=True,
    help="Prompts of one length (fixed), of log-normal lengths (mixed), or from --prompts (file).",
)
@click.option("--prompts", type=PATH, help="UTF-8 text file with one prompt in each line.")
@click.option(
    "--prompt-tokens", type=click.IntRange(1), default=32, show_default=True, help="Length of a prompt, in tokens."
)
@click.option(
    "--new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Length of an answer, in tokens."
)
@click.option(
    "--memory",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Number of vLLM servers to start for each adapter to measure peak memory; 3 or more give an interval.",
)
@click.option("--cross-check", is_flag=True, help="Also run `vllm bench serve` against the same server.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(1),
    default=120,
    show_default=True,
    help="Seconds without output before giving up on the server.",
)
@START_TIMEOUT
@device_option(
    "--device", "Device that PyTorch runs on: the engine torch, and the models that answers are compared with."
)
@compute_dtype_option("Data type that PyTorch runs in.")
@click.option("--seed", default=0, show_default=True, help="Seed of random weights, lengths and order.")
@click.option("--allow-unequal", is_flag=True, help="Compare adapters of different ranks or targets.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, without the samples.")
@click.pass_obj
def parity(
    options: tuple[str, ...],
    /,
    adapter: Path,
    baseline: Path | None,
    checkpoint: Path | None,
    also_adapters: tuple[Path, ...],
    engines: tuple[str, ...],
    num_prompts: int,
    max_concurrency: tuple[int, ...],
    margin: float,
    output: Path | None,
    model: str | None,
    vllm: str,
    graph: Path | None,
    workload: WorkloadKind,
    prompts: Path | None,
    prompt_tokens: int,
    new_tokens: int,
    memory: int,
    cross_check: bool,
    timeout_s: float,
    start_timeout_s: float,
    device: str,
    compute_dtype: str,
    seed: int,
    allow_unequal: bool,
    as_json: bool,
) -> int:
    """Measure whether a folded adapter is as fast as a plain LoRA, and gives the answers it should.

    An equivalence test compares their times with a margin; a second copy of the plain LoRA shows the machine's noise.
    Answers are compared with PyTorch's.

    Words after -- are passed to `vllm serve`, except options that this command sets itself, such as the prefix cache.

    Exit code 0: equivalent; 1: different; 3: inconclusive; 2: unusable request, or an engine that failed.
    """
    from loraover.common.command_line import quiet_libraries
    from loraover.reporting.reporter import ConsoleReporter
    from loraover_serve.comparison.report import UnwrittenReportError
    from loraover_serve.parity.run import measure_parity

    quiet_libraries()
    try:
        report = measure_parity(
            adapter,
            baseline=baseline,
            checkpoint=checkpoint,
            also_adapters=also_adapters,
            engines=engines,
            num_prompts=num_prompts,
            max_concurrency=max_concurrency,
            margin=margin,
            output=output,
            model=model,
            vllm=vllm,
            graph=graph,
            workload=workload,
            prompts=prompts,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            memory=memory,
            cross_check=cross_check,
            timeout_s=timeout_s,
            start_timeout_s=start_timeout_s,
            device=device,
            compute_dtype=compute_dtype,
            seed=seed,
            allow_unequal=allow_unequal,
            options=options,
            report=ConsoleReporter(),
        )
    except UnwrittenReportError as error:
        _show(error.report, as_json)
        raise
    _show(report, as_json)
    if output is not None:
        click.echo(f"wrote {output}", err=as_json)
    return report.exit_code


def _show(report: ParityReport, as_json: bool) -> None:
    from rich.console import Console

    from loraover_serve.parity.report.show import show_report

    show_report(report, Console(stderr=as_json))
    if as_json:
        print(report.model_dump_json(exclude={"runs"}, indent=1))
