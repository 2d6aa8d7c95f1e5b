"""What writing an adapter for vLLM proves: the contents of `vllm_certificate.json`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from loraover_export.logits.judge import Proof
from loraover_export.numerics.matrix_certificate import MatrixCertificate

CERTIFICATE_FILE = "vllm_certificate.json"


class VllmCertificate(Proof):
    """Errors of the matrices of a written adapter, and the contents of `vllm_certificate.json`."""

    verdict: Literal["passed", "failed"]
    base_model: str | None = Field(description="Base model that the written adapter names")
    dtype: str = Field(description="Data type that the adapter is stored in: fp32, bf16 or fp16")
    rank: int = Field(description="Rank of every module; smaller ranks are padded with zeros")
    scaling: dict[str, float] = Field(description="Factor that B was multiplied by, by module")
    matrices: list[MatrixCertificate] = Field(description="One certificate for each A and each scaling * B")
    versions: dict[str, str] = Field(description="Versions of Python and packages, by name")
    hardware: str = Field(description="Processor and accelerator of the machine, in words")
