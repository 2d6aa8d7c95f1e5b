"""What a finished run says of itself: `run.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from loraover.common.strict_json import read_json

RUN_FILE = "run.json"


class Measures(BaseModel):
    """Held-out measures at one moment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples: int = Field(description="that the loss is of")
    loss: float = Field(description="nats per completion token")
    exact_match: float | None = Field(None, description="share of all held-out examples answered exactly")

    def __str__(self) -> str:
        accuracy = "" if self.exact_match is None else f", exact match {self.exact_match:.1%}"
        return f"held-out loss {self.loss:.4f}{accuracy} ({self.examples} examples)"


class RunResult(BaseModel):
    """Contents of `run.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    method: str
    model: str
    model_origin: str
    data_origin: str
    learning_rate: float
    seed: int
    steps: int
    train_seconds: float = Field(description="of this process; a resumed run counts from its resumption")
    timed_steps: int | None = Field(None, description="steps that train_seconds are of")
    peak_bytes: int | None = Field(
        None, description="most memory held: by PyTorch on a CUDA device, or without one by the process"
    )
    lora_parameters: int = Field(description="numbers in A and B, which are what is served; of full fine-tuning, all")
    added_parameters: int = Field(description="numbers in the cores beyond the matrices that they stand for")
    update_norm: float | None = Field(
        description="Frobenius norm of what the run has added to B A over all modules, scaling included; None where "
        "more than B A is trained: full fine-tuning, DoRA"
    )
    before: Measures | None
    after: Measures | None
    versions: dict[str, str]
    hardware: str | None = None

    def facts(self) -> dict[str, str]:
        """Rows for people."""
        rows = {
            "method": self.method,
            "base model": self.model_origin,
            "training data": self.data_origin,
            "steps, learning rate, seed": f"{self.steps}, {self.learning_rate:g}, {self.seed}",
            "parameters served": f"{self.lora_parameters:,}",
            "parameters added while training": f"{self.added_parameters:,}",
        }
        if self.update_norm is not None:
            rows["norm of delta(B A)"] = f"{self.update_norm:.4g}"
        if self.before is not None and self.after is not None:
            rows |= {"before": str(self.before), "after": str(self.after)}
        return rows


def read_run(folder: Path) -> RunResult:
    """The result of a finished run.

    Raises:
        CheckpointError: no run there, or one that is not finished.
    """
    return read_json(folder / RUN_FILE, RunResult)
