"""What a fold proves: `fold_certificate.json`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from loraover_export.numerics.matrix_certificate import MatrixCertificate

CERTIFICATE_FILE = "fold_certificate.json"
NOISE_FACTOR = 3.0
POWER = 2.0
"""How many bounds an adapter must move logits by, so that its loss could not pass for noise."""

CheckVerdict = Literal["passed", "failed", "inconclusive"]
EXIT_CODES: dict[str, int] = {"passed": 0, "not checked": 0, "failed": 1, "inconclusive": 3}


class Deviation(BaseModel):
    """How far one model's outputs are from another's, over all positions of all prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_logit: float
    mean_logit: float
    max_kl: float = Field(description="nats, KL(unfolded || other)")
    mean_kl: float
    top1_agreement: float = Field(description="share of positions with the same most likely token")


class OutputCertificate(BaseModel):
    """The folded adapter, as PEFT loads it, against the unfolded model, beside the noise of an equal rounding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    compute_dtype: str
    prompts: int
    tokens: int
    prompt_source: str
    error: Deviation
    noise: Deviation = Field(description="the largest between any two twins")
    twins: int = Field(description="adapters whose elements were rounded at random to a neighbour, ranks permuted")
    adapter_effect: float = Field(description="largest logit change that the adapter makes to the base model")

    @property
    def bound(self) -> float:
        """NOISE_FACTOR times the noise, largest logit error.

        Two twins differ by two random roundings, each of twice the variance of one rounding to nearest, so about half
        of their noise is expected; the factor leaves room for the spread of maxima and for the other arithmetic of
        the unfolded model.
        """
        return NOISE_FACTOR * self.noise.max_logit

    @property
    def verdict(self) -> CheckVerdict:
        return judge(self.error.max_logit, self.bound, self.adapter_effect)

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


def judge(error: float, bound: float, adapter_effect: float) -> CheckVerdict:
    """Verdict on a logit error.

    The verdict is inconclusive where the error is within its bound, and an adapter that does nothing could be too:
    where the adapter itself moves no logit by POWER bounds.
    """
    if not error <= bound:
        return "failed"
    return "inconclusive" if adapter_effect < POWER * bound else "passed"


class FoldCertificate(BaseModel):
    """Contents of `fold_certificate.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    verdict: CheckVerdict
    base_model: str | None
    dtype: str
    decomposition: str
    step: int
    seed: int | None
    matrices: list[MatrixCertificate]
    outputs: OutputCertificate | None
    output_bound: float | None
    versions: dict[str, str]
    hardware: str

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"
