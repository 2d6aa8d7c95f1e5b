"""The report of a verification, as `verify.json` has it, what it is made from, and engines' logs beside it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from loraover.common.atomic_output import publish_file
from loraover.common.strict_json import StrictModel
from loraover.reporting.html_page import in_sentences
from loraover_export.known_faults import faults_of, known_faults
from loraover_serve.judge.estimates import Interval
from loraover_serve.judge.limits import EXIT_CODES, Verdict
from loraover_serve.judge.results import Caches, Churn, GreedyAgreement, LogprobDistance, MixedBatch, Replicas, Suspect
from loraover_serve.judge.vectors.reading import VectorFindings

REPORT_FILE = "verify.json"
KEPT_PREFIX = "loraover-verify-kept-"
"""Beginning of the names of temporary folders that outlive a verification."""


class EngineResult(StrictModel):
    """Verdict on one engine."""

    engine: str = Field(description="Name of the engine, as --engine takes it; endpoint for a server at --endpoint")
    program: str | None = Field(
        default=None, description="Program that answered, such as vLLM; None if a server does not tell it"
    )
    version: str | None = Field(default=None, description="Version of the program; None if it does not report it")
    known_faults: tuple[str, ...] = Field(
        default=(), description="Known faults of that version, by their names in docs/faults.md; they change no verdict"
    )
    verdict: Verdict
    reason: str = Field(description="Reason for the verdict, in a sentence for each part that was checked")
    not_checked: list[str] = Field(default=[], description="Things that the answers do not show, in words")
    fault: str | None = Field(default=None, description="The likely fault; None if none explains the answers")
    compared: Literal["all tokens", "top tokens", "vectors"] | None = Field(
        default=None,
        description="Tokens whose logprobs were compared at each position, or vectors; None after a failure",
    )
    base: LogprobDistance | None = Field(
        default=None, description="Distance of the engine's base model from PyTorch's: the engine's noise"
    )
    number_format: str | None = Field(
        default=None, description="Number format whose rounding moves PyTorch's base model about as far"
    )
    cache_share: float = Field(
        default=0.0,
        description="Share of the base model's distance that a KV cache in float8 explains; 0 if it explains none, or "
        "a fault of the base model does",
    )
    strength: Interval | None = Field(
        default=None, description="Strength of the adapter; None after a failure, and where prompts are too few"
    )
    allowed_strength: tuple[float, float] | None = Field(
        default=None, description="Least and largest strength that a right adapter has on this engine"
    )
    adapter: LogprobDistance | None = Field(
        default=None, description="Distance of the adapter's answers from PyTorch's"
    )
    effect: float | None = Field(default=None, description="RMS change of logprobs by the adapter, in nats")
    allowed: float | None = Field(default=None, description="Largest distance that the noise explains, in nats")
    visible_share: float = Field(
        default=1.0,
        description="Smallest share of answers without the adapter that these answers show with a probability of 99 %",
    )
    replicas: Replicas | None = Field(
        default=None, description="Answers of which some are wrong; None if none are, or all"
    )
    servers: dict[str, list[str]] = Field(
        default={}, description="Header that names the servers that answered, with its values; empty if none does"
    )
    weights: str | None = Field(
        default=None,
        description="Served weights on which PyTorch ran, of those that a reference holds the ones that the answers "
        "of the base model fit best; None if they are the base model's own",
    )
    greedy: GreedyAgreement | None = Field(
        default=None, description="Greedy answers; None if the engine hides its token ids"
    )
    mixed: MixedBatch | None = Field(
        default=None, description="Answers in mixed batches; None if the engine takes one request at a time"
    )
    mixed_failure: str | None = Field(
        default=None, description="Reason why mixed batches were not compared; None if they were, or need not be"
    )
    template: str | None = Field(
        default=None, description="How the server reads chats, in words; None if it was not asked for any"
    )
    caches: Caches | None = Field(
        default=None, description="Answers on keys and values that the server has kept; None if not asked for"
    )
    churn: Churn | None = Field(default=None, description="Answers while adapters came and went; None if not asked for")
    vectors: VectorFindings | None = Field(
        default=None, description="Vectors, classes or scores in place of logprobs; None if next tokens were compared"
    )
    suspects: list[Suspect] = Field(default=[], description="Faults that were compared, the nearest first")
    seconds: float = Field(description="Seconds to export, start and ask the engine")
    requests: int = Field(default=0, description="Number of requests of a check by a reference; 0 in other checks")

    @property
    def plainly(self) -> str:
        """The verdict and its reason, in sentences; `not_checked` belongs below them."""
        return f"{self.verdict}. {in_sentences(self.reason)}"


class VerifyReport(StrictModel):
    """Contents of `verify.json`."""

    schema_version: int = 1
    verdict: Verdict = Field(description="The worst verdict of the engines")
    engines: list[EngineResult]
    adapter: str = Field(description="Folder of the adapter or checkpoint")
    base_model: str = Field(description="Name or folder of the base model")
    reference: str = Field(description="The model in PyTorch that answers as trained")
    sensitivity: float = Field(
        description="Ratio by which bfloat16 arithmetic moves the adapted model's logprobs more than the base model's, "
        "at least 1"
    )
    bias: float = Field(description="Strength of the adapter if PyTorch computes in bfloat16")
    served_format: str = Field(description="Coarsest number format of the base model that was declared")
    prompts: int = Field(description="Number of prompts")
    prompt_source: str = Field(description="Origin of the prompts, in words")
    new_tokens: int = Field(description="Number of tokens of each greedy answer")
    device: str = Field(description="Device that PyTorch ran on")
    command: str = Field(description="Command line that makes the same comparison")
    versions: dict[str, str] = Field(description="Versions of packages")
    hardware: str = Field(description="Processor, memory and system")
    date: str = Field(description="Day of the verification, in UTC")
    kept: Path | None = Field(
        default=None,
        exclude=True,
        description="Folder of the report, if the output could not be written; not in files",
    )

    @property
    def passed(self) -> bool:
        """Whether every engine answers as the adapter was trained."""
        return self.verdict == "as trained"

    @property
    def exit_code(self) -> int:
        """0 as trained, 1 differs, 3 inconclusive, 2 failed."""
        return EXIT_CODES[self.verdict]


def faults_known_of(program: tuple[str, str] | None) -> dict[str, Any]:
    """Fields of a result that name the program which answered, its version and its known faults; empty if unknown.

    Args:
        program: Name that `--engine` takes, and version.
    """
    if program is None:
        return {}
    name, version = program
    known = tuple(fault.name for fault in faults_of(name, version))
    return {"program": known_faults().names.get(name, name), "version": version, "known_faults": known}


def copy_logs(logs: Sequence[Path], folder: Path) -> None:
    """Copy engines' logs to a folder."""
    for log in logs:
        publish_file(folder / log.name, partial(shutil.copyfile, log))
