"""The report of a parity run: `parity.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from loraover.common.strict_json import StrictModel
from loraover_serve.parity.judge.analysis import Latency, Result, Throughput
from loraover_serve.parity.judge.outputs import Outputs
from loraover_serve.parity.judge.several import Together
from loraover_serve.parity.measure.cross_check import CrossCheck
from loraover_serve.parity.measure.memory import PeakMemory
from loraover_serve.parity.samples import Measurement

REPORT_FILE = "parity.json"
EngineVerdict = Literal["equivalent", "different", "inconclusive", "failed"]
EXIT_CODES = {"equivalent": 0, "different": 1, "inconclusive": 3, "failed": 2}


class ParityReport(StrictModel):
    """Contents of `parity.json`; after a failure, everything that was measured before it."""

    schema_version: int = 3
    verdict: EngineVerdict = Field(description="Verdict on the folded adapter against the vanilla one")
    reason: str = Field(description="Reason for the verdict, in words")
    margin: float = Field(description="Largest difference of times that still counts as equal, as a share")
    alpha: float = Field(description="Level of significance of the tests")
    results: list[Result]
    latencies: list[Latency]
    throughputs: list[Throughput]
    memory: list[PeakMemory]
    outputs: list[Outputs]
    together: list[Together] = Field(
        default=[], description="Answers of several adapters in turn or in one batch, beside each adapter's alone"
    )
    cross_checks: list[CrossCheck]
    notes: list[str] = Field(description="Failures of measurements that the verdict does not depend on")
    runs: list[Measurement] = Field(description="Samples of every engine at every concurrency")
    base_model: str = Field(description="Name or folder of the base model")
    adapters: dict[str, str] = Field(description="Folder or origin of each arm's adapter")
    workload: dict[str, str | int] = Field(description="Kind, number and lengths of the requests")
    device: str = Field(default="cpu", description="Device that PyTorch ran on: cpu, cuda, cuda:1 or mps")
    compute_dtype: str = Field(default="fp32", description="Data type that PyTorch ran in: fp32, bf16, fp16 or fp64")
    seed: int
    command: str = Field(description="Command line that makes the same measurement")
    versions: dict[str, str] = Field(description="Versions of packages and engines")
    hardware: str = Field(description="Processor, memory and system")
    date: str = Field(description="Day of the measurement, in UTC")
    kept: Path | None = Field(
        default=None, exclude=True, description="Folder of vLLM's logs, after a failure without an output; not in files"
    )

    @property
    def exit_code(self) -> int:
        """0 equivalent, 1 different, 3 inconclusive, 2 failed."""
        return EXIT_CODES[self.verdict]
