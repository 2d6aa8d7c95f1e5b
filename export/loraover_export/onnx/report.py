"""What an ONNX export proves: `onnx_report.json`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from loraover_export.certificate import MatrixCertificate

REPORT_FILE = "onnx_report.json"
ENGINE_FACTOR = 6.0


class CaseError(BaseModel):
    """Logits of ONNX Runtime against PyTorch at one shape."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    case: str
    max_logit: float
    mean_logit: float


class Greedy(BaseModel):
    """Greedy decoding through the cache, against PyTorch's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    first_difference: int | None = Field(description="position of the first other token")
    gap: float | None = Field(description="there, how far apart PyTorch's logits of the two tokens are")


class GraphCheck(BaseModel):
    """One adapter in the graph, or none, against the unfolded PyTorch model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapter: str | None = Field(description="None: the base model")
    cases: list[CaseError]
    noise: float = Field(description="largest logit error that this precision makes without an export; see `noise_of`")
    noise_of: str
    adapter_effect: float = Field(description="largest change that the adapter makes to a logit")
    greedy: Greedy | None

    @property
    def error(self) -> float:
        return max(case.max_logit for case in self.cases)

    @property
    def bound(self) -> float:
        """ENGINE_FACTOR times the noise.

        ONNX Runtime and PyTorch each round in an order of their own, so twice the noise is expected; the factor leaves
        room for the spread of maxima over some dozens of positions. Of 150 random models with two layers, the largest
        error was the noise itself in the median and 3.4 times the noise at worst.
        """
        return ENGINE_FACTOR * self.noise

    @property
    def passed(self) -> bool:
        greedy = self.greedy
        same = greedy is None or greedy.gap is None or greedy.gap <= 2 * self.bound
        return self.error <= self.bound and same


class OnnxReport(BaseModel):
    """Contents of `onnx_report.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    verdict: Literal["passed", "failed", "not checked"]
    mode: Literal["merged", "swappable"]
    precision: Literal["fp32", "fp16", "int4"]
    device: Literal["cpu", "cuda"]
    cache: bool
    checked_on: str = Field(description="cpu or cuda: where ONNX Runtime ran the checks")
    base_model: str
    adapters: dict[str, str] = Field(description="sources by name")
    checks: list[GraphCheck]
    matrices: list[MatrixCertificate] = Field(description="weights with their delta, or LoRA matrices, as written")
    versions: dict[str, str]
    hardware: str

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks) and all(matrix.passed for matrix in self.matrices)
