"""The command `loraover eval`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from loraover.evaluation import TASKS


@click.command("eval")
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
    from loraover.evaluation.run import EvaluationRequest, evaluate
    from loraover.reporting.reporter import ConsoleReporter

    request = EvaluationRequest(
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
    found = evaluate(request, output, ConsoleReporter(Console(stderr=as_json)))
    if as_json:
        print(found.model_dump_json(indent=1))
    return int(any(result.failure for result in found.results))
