"""What an ONNX export proves: `onnx_report.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from loraover_export.fold.certificate import CheckVerdict, judge
from loraover_export.numerics.matrix_certificate import MatrixCertificate

REPORT_FILE = "onnx_report.json"
ENGINE_FACTOR = 6.0
CHANGE_FACTOR = 2.0


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
    compared: Literal["logits", "change"] = Field(
        default="logits", description="change: what the adapter adds to the base model's logits, in each engine"
    )
    cases: list[CaseError]
    noise: float = Field(description="largest logit error that this precision makes without an export; see `noise_of`")
    noise_of: str
    adapter_effect: float = Field(description="largest change that the adapter makes to a logit")
    greedy: Greedy | None

    @property
    def quantity(self) -> str:
        """What is compared, for people."""
        return "logit" if self.compared == "logits" else "logit change"

    @property
    def error(self) -> float:
        return max(case.max_logit for case in self.cases)

    @property
    def bound(self) -> float:
        """ENGINE_FACTOR times the noise; of a change, CHANGE_FACTOR times.

        ONNX Runtime and PyTorch each round in an order of their own, so twice the noise is expected; the factor leaves
        room for the spread of maxima over some dozens of positions. Of 150 random models with two layers, the largest
        error was the noise itself in the median and 3.4 times the noise at worst.

        A change is compared in int4 graphs, whose rounding PyTorch repeats: over 48 changes by adapters of 12 random
        models, the error was 0.90 to 1.17 times the noise.
        """
        return (CHANGE_FACTOR if self.compared == "change" else ENGINE_FACTOR) * self.noise

    @property
    def verdict(self) -> CheckVerdict:
        """Passed, failed, or inconclusive: an adapter that does nothing would pass as well."""
        greedy = self.greedy
        if greedy is not None and greedy.gap is not None and not greedy.gap <= 2 * self.bound:
            return "failed"
        return judge(self.error, self.bound, math.inf if self.adapter is None else self.adapter_effect)

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


class OnnxReport(BaseModel):
    """Contents of `onnx_report.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    verdict: Literal["passed", "failed", "inconclusive", "not checked"]
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


def judge_export(
    checks: Sequence[GraphCheck], matrices: Sequence[MatrixCertificate]
) -> Literal["passed", "failed", "inconclusive", "not checked"]:
    """Failed if anything failed; inconclusive if an adapter has no check that would have noticed its loss."""
    if not all(matrix.passed for matrix in matrices) or any(check.verdict == "failed" for check in checks):
        return "failed"
    if not checks:
        return "not checked"
    proven = {check.adapter for check in checks if check.passed}
    return "passed" if proven == {check.adapter for check in checks} else "inconclusive"
