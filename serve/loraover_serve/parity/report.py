"""What a parity run found: `parity.json`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from loraover_serve.parity.analysis import Latency, Result, Throughput
from loraover_serve.parity.outputs import Outputs

REPORT_FILE = "parity.json"
EXIT_CODES = {"equivalent": 0, "different": 1, "inconclusive": 3, "failed": 2}


class SampleRecord(BaseModel):
    """One answer; times in seconds on a clock of its run's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arm: str
    block: int
    request: int
    start_s: float
    token_s: tuple[float, ...]
    token_ids: tuple[int, ...]


class RunRecord(BaseModel):
    """One engine at one concurrency."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    concurrency: int
    blocks: int = Field(description="run whole, warm-up left out")
    failure: str | None = Field(description="why it ended early")
    samples: list[SampleRecord]


class ParityReport(BaseModel):
    """Contents of `parity.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    verdict: Literal["equivalent", "different", "inconclusive", "failed"]
    reason: str
    margin: float
    alpha: float
    results: list[Result]
    latencies: list[Latency]
    throughputs: list[Throughput]
    outputs: list[Outputs]
    runs: list[RunRecord]
    base_model: str
    adapters: dict[str, str]
    workload: dict[str, str | int]
    seed: int
    command: str
    versions: dict[str, str]
    hardware: str

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]
