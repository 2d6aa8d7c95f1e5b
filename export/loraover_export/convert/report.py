"""Result of a conversion."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from loraover_export.convert.engines import VllmFit
from loraover_export.uniform.certificate import LoraCertificate, OutputsOfConversion


class ConvertReport(BaseModel):
    """Ranks, errors and certificate of one conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(description="kind of the source, as PEFT names it")
    exact_rank: int = Field(description="largest rank of any module's exact delta_W")
    truncated: bool = Field(description="whether a smaller rank than the exact one was asked for")
    vllm: VllmFit = Field(description="whether vLLM takes the written rank")
    engines: str = Field(description="which engines take the exact rank, in words")
    certificate: LoraCertificate = Field(description="verdict and errors of the written adapter")

    @property
    def outputs(self) -> OutputsOfConversion | None:
        """Comparison of logits; None if it was not asked for, or a matrix failed its check."""
        return self.certificate.outputs

    @property
    def passed(self) -> bool:
        """Whether the certificate's verdict is "passed"."""
        return self.certificate.passed

    @property
    def exit_code(self) -> int:
        """Exit code of the command."""
        return self.certificate.exit_code
