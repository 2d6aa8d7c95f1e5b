"""Result of an export for vLLM, and what writing the adapter proves: the contents of `vllm_certificate.json`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from loraover.adapters.logits.verdict import Certificate
from loraover.adapters.numerics.matrix_certificate import MatrixCertificate
from loraover.adapters.uniform.certificate import LoraCertificate
from loraover.common.strict_json import StrictModel
from loraover_export.formats.vllm.preflight import Preflight


class VllmCertificate(Certificate):
    """Errors of the matrices of a written adapter, and the contents of `vllm_certificate.json`."""

    verdict: Literal["passed", "failed"]
    base_model: str | None = Field(description="Base model that the written adapter names")
    dtype: str = Field(description="Data type that the adapter is stored in: fp32, bf16 or fp16")
    rank: int = Field(description="Rank of every module; smaller ranks are padded with zeros")
    scaling: dict[str, float] = Field(description="Factor that B was multiplied by, by module")
    matrices: list[MatrixCertificate] = Field(description="One certificate for each A and each scaling * B")
    versions: dict[str, str] = Field(description="Versions of Python and packages, by name")
    hardware: str = Field(description="Processor and accelerator of the machine, in words")


class VllmReport(StrictModel):
    """Pre-flight, certificate and launch commands of one export for vLLM."""

    preflight: Preflight = Field(description="Check of the adapter against vLLM's rules")
    conversion: LoraCertificate | None = Field(
        default=None, description="Certificate of the conversion into a plain LoRA; None if there was none"
    )
    certificate: VllmCertificate | None = Field(
        default=None, description="Errors of the written matrices; None if the pre-flight failed"
    )
    serve: str | None = Field(
        default=None, description="Command that starts vLLM with the adapter; None if nothing was written"
    )
    load: str | None = Field(
        default=None, description="Command that adds the adapter to a running server; None if nothing was written"
    )

    @property
    def passed(self) -> bool:
        """Whether pre-flight and certificate passed, so that the adapter was written."""
        return self.certificate is not None and self.certificate.passed

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0: written, 1: a matrix failed its check, 2: the pre-flight found an error."""
        return 0 if self.passed else 1 if self.preflight.passed else 2
