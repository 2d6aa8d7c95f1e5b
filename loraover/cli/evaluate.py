"""The command `loraover eval`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraover.common.command_line import Command, DtypeChoice
from loraover.evaluation import TASKS

if TYPE_CHECKING:
    from loraover.evaluation.results import Evaluation


@click.command(
    "eval",
    cls=Command,
    examples=[
        "loraover eval HuggingFaceTB/SmolLM2-135M-Instruct --task gsm8k --adapter runs/demo-1/adapter --limit 100",
        "loraover eval MODEL --task qnli --endpoint http://localhost:8000/v1 --endpoint-model MODEL "
        "--endpoint-model my-adapter",
    ],
    renamed={
        "--examples": "--limit",
        "--chat": "--apply-chat-template",
        "--no-chat": "--no-apply-chat-template",
    },
)
@click.argument("model")
@click.option("--task", required=True, type=click.Choice(list(TASKS)), help="Benchmark, see docs/evaluation.md.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Folder of an adapter to compare with the base model. Can be repeated.",
)
@click.option("--data", help="Questions: JSONL file, folder or hub name. Default: the task's data set on the hub.")
@click.option("--limit", type=click.IntRange(1), help="Number of questions, from the first. Default: all.")
@click.option(
    "--endpoint", help="Address of an OpenAI-compatible server, such as vLLM, that answers in place of PyTorch."
)
@click.option(
    "--endpoint-model",
    "endpoint_models",
    multiple=True,
    help="Name of a model at the endpoint, the base model's first. Can be repeated.",
)
@click.option("--endpoint-key-variable", help="Environment variable that holds the endpoint's key.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Number of questions at the same time."
)
@click.option(
    "--dtype",
    type=DtypeChoice("fp32", "bf16", "fp16"),
    default="fp32",
    show_default=True,
    help="Data type of the weights in memory; PyTorch's names, such as bfloat16, are taken too.",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), help="Largest number of tokens in an answer. Default: the task's."
)
@click.option(
    "--apply-chat-template/--no-apply-chat-template",
    default=None,
    help="Put questions into the tokenizer's chat template, or not. Default: yes if the tokenizer has one.",
)
@click.option("--allow-code-execution", is_flag=True, help="Run code that the model writes, in a sandbox.")
@click.option("--judge-url", help="Address of the OpenAI-compatible server of the judge, the model that rates answers.")
@click.option("--judge-model", help="Name of the judge on its server.")
@click.option("--judge-key-variable", help="Environment variable that holds the judge's key.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="JSON file for the results; an unfinished file of the same evaluation is resumed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def evaluate_command(
    model: str,
    task: str,
    adapters: tuple[Path, ...],
    data: str | None,
    limit: int | None,
    endpoint: str | None,
    endpoint_models: tuple[str, ...],
    endpoint_key_variable: str | None,
    batch_size: int,
    dtype: str,
    max_new_tokens: int | None,
    apply_chat_template: bool | None,
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

    quiet_libraries()
    from loraover.evaluation.results import show_evaluation
    from loraover.evaluation.run import evaluate
    from loraover.reporting.reporter import ConsoleReporter

    console = Console(stderr=as_json)
    finished: list[Evaluation] = []
    try:
        found = evaluate(
            model,
            task,
            adapters=adapters,
            data=data,
            limit=limit,
            endpoint=endpoint,
            endpoint_models=endpoint_models,
            endpoint_key_variable=endpoint_key_variable,
            batch_size=batch_size,
            dtype=dtype,
            max_new_tokens=max_new_tokens,
            apply_chat_template=apply_chat_template,
            allow_code_execution=allow_code_execution,
            judge_url=judge_url,
            judge_model=judge_model,
            judge_key_variable=judge_key_variable,
            output=output,
            on_result=finished.append,
            report=ConsoleReporter(console),
            command=shlex.join(["loraover", *sys.argv[1:]]),
        )
    finally:  # what is finished is shown at Ctrl-C and after a failure too
        if finished:
            show_evaluation(finished[-1], console)
    if as_json:
        print(found.model_dump_json(indent=1))
    return int(any(result.failure for result in found.results))
