"""What a parity run found: `parity.json`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from loraover_serve.parity.judge.analysis import Latency, Result, Throughput
from loraover_serve.parity.judge.outputs import Outputs
from loraover_serve.parity.measure.cross_check import CrossCheck
from loraover_serve.parity.measure.memory import PeakMemory
from loraover_serve.parity.samples import Measurement

REPORT_FILE = "parity.json"
EngineVerdict = Literal["equivalent", "different", "inconclusive", "failed"]
EXIT_CODES = {"equivalent": 0, "different": 1, "inconclusive": 3, "failed": 2}


class ParityReport(BaseModel):
    """Contents of `parity.json`; a failed run's has what was measured before the failure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 3
    verdict: EngineVerdict
    reason: str
    margin: float
    alpha: float
    results: list[Result]
    latencies: list[Latency]
    throughputs: list[Throughput]
    memory: list[PeakMemory]
    outputs: list[Outputs]
    cross_checks: list[CrossCheck]
    notes: list[str]
    runs: list[Measurement]
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
