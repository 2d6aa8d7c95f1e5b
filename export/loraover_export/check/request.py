"""Arguments of a check of one adapter or many, and of their preparation, examined before any file is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loraover.adapters.uniform.request_fields import approximate_to_rank, base_model, given_adapter
from loraover.common.request import AnyName, AnyNames, AnyPath, Request, option
from loraover.models.device import DTYPES
from loraover_export.check.engines import ENGINES

LINES = "Print a JSON object for each adapter, one a line, as soon as it is done."


@dataclass(frozen=True)
class CheckRequest(Request):
    """Say for each engine whether it would refuse ADAPTER or silently apply it wrongly, and what repairs that.

    ADAPTER is a LoRA-Over checkpoint or a PEFT adapter of any method. No engine is run or needs to be installed. Each
    engine is judged on what our export for it writes, after a conversion where the adapter is of another kind, and on
    the adapter as it is, in PEFT's form.

    Exit code 1: one of the engines that `--engine` names takes the adapter in neither form. Without `--engine`, no
    engine takes it.
    """

    verb = "loraover check"
    examples = (
        "loraover check runs/a/adapter",
        "loraover check my-lora --engine vllm --engine llamacpp --model ./Qwen3-0.6B",
    )

    adapter: AnyPath = given_adapter("LoRA-Over checkpoint, or PEFT adapter of any method")
    engines: AnyNames = option(
        "Engine to check for.", default=(), default_text="all", flag="--engine", choices=tuple(ENGINES)
    )
    model: AnyName | None = base_model()

    @property
    def chosen(self) -> tuple[str, ...]:
        """The engines to check for, each once."""
        return tuple(dict.fromkeys(self.engines)) or tuple(ENGINES)


def number_of_jobs() -> Any:
    """Declare the field `jobs`, the number of processes."""
    return option("Number of processes, each of which takes one adapter at a time.", default=1, least=1)


def table_page(default: str) -> Any:
    """Declare the field `html`, the page with the table."""
    return option(
        "File for a page with a table of all adapters, which sorts and filters. An earlier page is replaced.",
        default=None,
        default_text=default,
    )


def ignore(row: Any, progress: str) -> None:
    """Receive a row, and do nothing."""


@dataclass(frozen=True)
class FleetRequest(Request):
    """Fields that the verbs of many adapters share; each verb declares others with its own help text.

    Args:
        receive: Function that gets each `Row` as soon as it is there, and how far the work is, in words.
    """

    receive: Callable[[Any, str], None] = field(default=ignore, kw_only=True, repr=False, compare=False)


@dataclass(frozen=True)
class FleetCheckRequest(FleetRequest):
    """Say for each engine whether it would refuse ADAPTER or silently apply it wrongly, and what repairs that.

    ADAPTER is a LoRA-Over checkpoint or a PEFT adapter of any method. No engine is run or needs to be installed. Each
    engine is judged on the adapter as it is, in PEFT's form, and on what the export for that engine writes. Several
    adapters become a table with a line for each, and one that cannot be read does not stop the others.
    `loraover export inspect-merge` looks for an adapter in weights that were merged already, and `loraover verify` in
    the answers of a server: texts, vectors, classes or scores.

    Exit code 1: an engine that `--engine` names cannot serve one of the adapters correctly, neither as it is nor as
    exported for that engine. Without `--engine`: for some adapter, no engine can serve it correctly.
    """

    verb = "loraover check"
    examples = (*CheckRequest.examples, "loraover check adapters/* --engine vllm --jobs 4 --html fleet.html")
    json_help = "Print the report as JSON; of several adapters, a JSON object for each, one a line."

    sources: AnyNames = given_adapter(
        "LoRA-Over checkpoints, or PEFT adapters of any method", is_source=False, metavar="ADAPTER..."
    )
    engines: AnyNames = option(
        "Engine to check adapters for.", default=(), default_text="all", flag="--engine", choices=tuple(ENGINES)
    )
    model: AnyName | None = base_model()
    jobs: int = number_of_jobs()
    html: AnyPath | None = table_page("none")


@dataclass(frozen=True)
class PrepareRequest(FleetRequest):
    """Prepare every SOURCE for an engine, in a cache by digest: check it, and fold, convert and export it as needed.

    SOURCE is a LoRA-Over checkpoint or a PEFT adapter of any kind. What the cache holds already is not made again, so a
    run that was interrupted is continued by the same command. One bad adapter does not stop the others.

    Exit code 1: some adapters were refused, or could not be read. The others are in the cache.
    """

    verb = "loraover export prepare"
    examples = (
        "loraover export prepare my-loha --cache cache --engine vllm",
        "loraover export prepare s3://bucket/shop org/support adapters/* --cache cache --max-lora-rank 32",
    )
    json_help = LINES

    sources: AnyNames = given_adapter(
        "LoRA-Over checkpoints, or PEFT adapters of any kind", is_source=False, metavar="SOURCE..."
    )
    cache: AnyPath = option("Folder of the prepared adapters, which is made if it is missing.", former=("-o",))
    engine: str = option("Engine to prepare for.", default="vllm", choices=tuple(ENGINES))
    model: AnyName | None = option(
        "Base model as the engine serves it: folder, hub name or address; for ONNX Runtime, the folder of a swappable "
        "export.",
        default=None,
        default_text="the one that each adapter names",
    )
    dtype: str = option("Data type to store A and B in.", default="bf16", choices=tuple(DTYPES))
    max_lora_rank: int | None = option(
        "Largest rank that the engine was started for.",
        default=None,
        default_text="the engine's own",
        former=("--max-rank",),
        least=1,
    )
    approximate_to_rank: int | None = approximate_to_rank()
    jobs: int = number_of_jobs()
    html: AnyPath | None = table_page("prepare.html in the cache")
