"""Request of an evaluation, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from loraover.adapters.uniform.request_fields import SPELLINGS, dtype_option
from loraover.common.request import AnyName, AnyNames, AnyPath, AnyPaths, Request, argument, option
from loraover.models.device import DTYPES
from loraover_lab.evaluation import TASKS


@dataclass(frozen=True)
class EvaluationRequest(Request):
    """Put a benchmark's questions to MODEL, a folder or hub name, and to its adapters."""

    verb = "loraover eval"
    extra = "eval"
    examples = (
        "loraover eval HuggingFaceTB/SmolLM2-135M-Instruct --task gsm8k --adapter runs/demo-1/adapter --limit 100",
        "loraover eval MODEL --task qnli --endpoint http://localhost:8000/v1 --endpoint-model MODEL "
        "--endpoint-model my-adapter",
    )

    model: AnyName = argument("Base model, folder or hub name.")
    task: str = option("Benchmark, see docs/evaluation.md.", choices=tuple(TASKS))
    adapters: AnyPaths = option(
        "Adapter to compare with the base model: folder, hub name or address.",
        default=(),
        flag="--adapter",
        is_source=True,
    )
    data: AnyName | None = option(
        "Questions: JSONL file, folder or hub name.", default=None, default_text="the task's data set on the hub"
    )
    limit: int | None = option("Number of questions, from the first.", default=None, default_text="all", least=1)
    endpoint: str | None = option(
        "Address of an OpenAI-compatible server, such as vLLM, that answers in place of PyTorch; the model names the "
        "tokenizer.",
        default=None,
        needs="endpoint_models",
    )
    endpoint_models: AnyNames = option(
        "Name of a model at the endpoint, the base model's first.",
        default=(),
        flag="--endpoint-model",
        needs="endpoint",
    )
    key_variable: str | None = option(
        "Environment variable that holds the endpoint's key.",
        default=None,
        former=("--endpoint-key-variable",),
        needs="endpoint",
    )
    batch_size: int = option("Number of questions at the same time.", default=8, least=1)
    dtype: str = dtype_option(f"Data type of the weights in memory{SPELLINGS}", DTYPES)
    new_tokens: int | None = option(
        "Largest number of tokens in an answer.",
        default=None,
        default_text="the task's number",
        former=("--max-new-tokens",),
        least=1,
    )
    apply_chat_template: bool | None = option(
        "Whether to put the questions into the tokenizer's chat template.",
        default=None,
        default_text="yes if the tokenizer has one",
    )
    allow_code_execution: bool = option("Run code that the model writes, in a sandbox.", default=False)
    judge_url: str | None = option(
        "Address of the OpenAI-compatible server of the judge, the model that rates answers.",
        default=None,
        needs="judge_model",
    )
    judge_model: str | None = option("Name of the judge on its server.", default=None, needs="judge_url")
    judge_key_variable: str | None = option(
        "Environment variable that holds the judge's key.", default=None, needs="judge_url"
    )
    output: AnyPath | None = option(
        "JSON file for the results, written after each model; an unfinished file of the same evaluation is resumed.",
        default=None,
        short="-o",
    )
    on_result: Callable[[Any], None] | None = option(
        "Function that is called after each model with the evaluation so far, which the caller then has if a later "
        "model is interrupted or this function raises.",
        default=None,
        is_hidden=True,
    )

    def faults(self) -> Iterator[str]:
        if self.endpoint is not None and (given := self.given("adapters", "dtype")):
            yield f"{given}: only for models in memory, and not for the server of {self.named('endpoint')}."
