"""Result of an export for vLLM."""

from __future__ import annotations

from pydantic import Field

from loraover.common.strict_json import StrictModel
from loraover_export.uniform.certificate import LoraCertificate
from loraover_export.vllm.certificate import VllmCertificate
from loraover_export.vllm.preflight import Preflight


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
