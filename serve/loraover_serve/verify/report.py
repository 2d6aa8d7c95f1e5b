"""The report of a verification, as `verify.json` has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from loraover_serve.comparison.thresholds import root_mean

REPORT_FILE = "verify.json"
Verdict = Literal["as trained", "differs", "inconclusive", "failed"]
EXIT_CODES: dict[Verdict, int] = {"differs": 1, "failed": 2, "inconclusive": 3, "as trained": 0}
"""Exit code of each verdict, the worst first: the verdict of several engines is the worst of theirs."""


class Model(BaseModel):
    """A part of the report."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LogprobDistance(Model):
    """Distance of an engine's logprobs from a model's in PyTorch, or from its own."""

    rms: float = Field(description="RMS difference of logprobs, in nats")
    error: float = Field(description="standard error of rms, in nats; with a single position rms itself")
    largest: float = Field(description="largest difference of a logprob, in nats")
    positions: int = Field(description="number of positions at which next tokens were compared")

    @classmethod
    def of(cls, differences: Sequence[NDArray[np.float64]]) -> LogprobDistance:
        """Summarise differences of logprobs, one array for each position."""
        squares = [float(np.mean(np.square(each))) for each in differences]
        rms, error = root_mean(squares)
        largest = max(float(np.abs(each).max()) for each in differences)
        return cls(rms=rms, error=error, largest=largest, positions=len(squares))


class MixedBatch(Model):
    """Answers to requests for both models that are sent together, beside those sent for one model at a time."""

    base: LogprobDistance = Field(description="distance between the base model's answers sent together and apart")
    adapter: LogprobDistance = Field(description="distance between the adapter's answers sent together and apart")
    other: LogprobDistance | None = Field(
        default=None,
        description="distance between the adapter's answers sent together with another adapter's requests and apart; "
        "None if the engine has no other adapter",
    )

    @property
    def rms(self) -> float:
        """The largest of the distances, in nats."""
        return max(each.rms for each in (self.base, self.adapter, self.other) if each is not None)


class Greedy(Model):
    """Greedy answers of the adapter, token by token, beside PyTorch's."""

    equal: float = Field(description="share of prompts that both answer with the same tokens")
    gap: float = Field(
        description="largest difference of the two tokens' logprobs in PyTorch, in nats, where an answer first differs"
    )
    allowed: float = Field(description="largest gap that the engine's noise explains, in nats")


class Suspect(Model):
    """One fault, as PyTorch computes it, beside the engine's answers."""

    fault: str = Field(description="name of the fault")
    detail: str = Field(description="the fault in words")
    rms: float = Field(
        description="RMS difference between the engine's logprobs and the fault's, in nats: over all prompts for the "
        "nearest faults, over the first three for the others"
    )
    explains: bool = Field(description="whether the fault explains the engine's answers within noise")


class EngineResult(Model):
    """Verdict on one engine."""

    engine: str = Field(description="name of the engine, as --engine takes it; endpoint for a server at --endpoint")
    version: str | None = Field(default=None, description="version of the engine; None if it does not report it")
    verdict: Verdict
    reason: str = Field(description="reason for the verdict, in words")
    fault: str | None = Field(default=None, description="the likely fault; None if none explains the answers")
    compared: Literal["all tokens", "top tokens"] | None = Field(
        default=None, description="tokens whose logprobs were compared at each position; None after a failure"
    )
    base: LogprobDistance | None = Field(
        default=None, description="distance of the engine's base model from PyTorch's: the engine's noise"
    )
    number_format: str | None = Field(
        default=None, description="number format whose rounding moves PyTorch's base model about as far"
    )
    adapter: LogprobDistance | None = Field(
        default=None, description="distance of the adapter's answers from PyTorch's"
    )
    effect: float | None = Field(default=None, description="RMS change of logprobs by the adapter, in nats")
    allowed: float | None = Field(default=None, description="largest distance that the noise explains, in nats")
    greedy: Greedy | None = Field(default=None, description="greedy answers; None if the engine hides its token ids")
    mixed: MixedBatch | None = Field(
        default=None, description="answers in mixed batches; None if the engine takes one request at a time"
    )
    unmixed: str | None = Field(
        default=None, description="reason why mixed batches could not be compared; None if they were, or need not be"
    )
    suspects: list[Suspect] = Field(default=[], description="faults that were compared, the nearest first")
    seconds: float = Field(description="seconds to export, start and ask the engine")


class VerifyReport(Model):
    """Contents of `verify.json`."""

    schema_version: int = 1
    verdict: Verdict = Field(description="the worst verdict of the engines")
    engines: list[EngineResult]
    adapter: str = Field(description="folder of the adapter or checkpoint")
    base_model: str = Field(description="name or folder of the base model")
    reference: str = Field(description="the model in PyTorch that answers as trained")
    sensitivity: float = Field(
        description="ratio by which bfloat16 arithmetic moves the adapted model's logprobs more than the base model's, "
        "at least 1"
    )
    prompts: int = Field(description="number of prompts")
    prompt_source: str = Field(description="origin of the prompts, in words")
    new_tokens: int = Field(description="number of tokens of each greedy answer")
    device: str = Field(description="device that PyTorch ran on")
    command: str = Field(description="command line that makes the same comparison")
    versions: dict[str, str] = Field(description="versions of packages")
    hardware: str = Field(description="processor, memory and system")
    date: str | None = Field(default=None, description="day of the verification, in UTC; None in older files")
    kept: Path | None = Field(
        default=None,
        exclude=True,
        description="folder of the report, if the output could not be written; not in files",
    )

    @property
    def exit_code(self) -> int:
        """0 as trained, 1 differs, 3 inconclusive, 2 failed."""
        return EXIT_CODES[self.verdict]
