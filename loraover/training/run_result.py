"""Result of a finished run: `run.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from loraover.common.strict_json import read_json

RUN_FILE = "run.json"


class Measures(BaseModel):
    """Held-out measures at one moment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples: int = Field(description="Number of held-out examples behind the loss.")
    loss: float = Field(description="Nats per completion token.")
    exact_match: float | None = Field(
        None, description="Share of the held-out examples answered exactly; None: not measured."
    )

    def __str__(self) -> str:
        accuracy = "" if self.exact_match is None else f", exact match {self.exact_match:.1%}"
        return f"held-out loss {self.loss:.4f}{accuracy} ({self.examples} examples)"


class RunResult(BaseModel):
    """Contents of `run.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    method: str = Field(description="Method of the recipe: lora, lora-over or full.")
    model: str = Field(description="Base model, as the recipe names it.")
    model_origin: str = Field(description="Base model with its commit or folder, for people.")
    data_origin: str = Field(description="Training data with its commit or file, for people.")
    learning_rate: float = Field(description="Peak learning rate.")
    seed: int = Field(description="Seed of the recipe.")
    steps: int = Field(description="Optimizer steps of the run.")
    train_seconds: float = Field(description="Seconds of training in this process; a resumed run trained longer.")
    timed_steps: int | None = Field(None, description="Optimizer steps within train_seconds.")
    peak_bytes: int | None = Field(
        None, description="Largest memory in bytes: PyTorch's on a CUDA device, else the process's."
    )
    lora_parameters: int = Field(description="Numbers in A and B, which are served; for method full, all weights.")
    added_parameters: int = Field(description="Numbers in the cores beyond those of the matrices that they represent.")
    gauge_numbers: int = Field(0, description="Numbers in bases that are not trained, and in their moments.")
    update_norm: float | None = Field(
        description="Frobenius norm, over all modules, of the change of scaling * B A during the run; None where more "
        "than B A is trained (full fine-tuning, DoRA)."
    )
    before: Measures | None = Field(description="Held-out measures before training; None: not measured.")
    after: Measures | None = Field(description="Held-out measures after training; None: not measured.")
    versions: dict[str, str] = Field(description="Versions of Python and of the libraries.")
    hardware: str | None = Field(None, description="Processor and accelerator.")

    def facts(self) -> dict[str, str]:
        """Name and value of each row of a table."""
        rows = {
            "method": self.method,
            "base model": self.model_origin,
            "training data": self.data_origin,
            "steps, learning rate, seed": f"{self.steps}, {self.learning_rate:g}, {self.seed}",
            "parameters served": f"{self.lora_parameters:,}",
            "parameters added while training": f"{self.added_parameters:,}",
        }
        if self.gauge_numbers:
            rows["numbers in bases and moments"] = f"{self.gauge_numbers:,}"
        if self.update_norm is not None:
            rows["norm of delta(B A)"] = f"{self.update_norm:.4g}"
        if self.before is not None and self.after is not None:
            rows |= {"before": str(self.before), "after": str(self.after)}
        return rows


def read_run(folder: Path) -> RunResult:
    """Read the result of a finished run.

    Args:
        folder: The run's folder.

    Raises:
        CheckpointError: no run there, or one that is not finished.
    """
    return read_json(folder / RUN_FILE, RunResult)
