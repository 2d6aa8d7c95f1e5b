"""What writing an adapter for vLLM proves: `vllm_certificate.json`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from loraover_export.numerics.matrix_certificate import MatrixCertificate

CERTIFICATE_FILE = "vllm_certificate.json"


class VllmCertificate(BaseModel):
    """Contents of `vllm_certificate.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    verdict: Literal["passed", "failed"]
    base_model: str | None
    dtype: str
    rank: int = Field(description="of every module; smaller ones are padded with zeros")
    scaling: dict[str, float] = Field(description="by module: what its B was multiplied by")
    matrices: list[MatrixCertificate] = Field(description="of A and scaling * B as written")
    versions: dict[str, str]
    hardware: str

    @property
    def passed(self) -> bool:
        return all(matrix.passed for matrix in self.matrices)
