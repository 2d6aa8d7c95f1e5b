"""Contents of `mlx_certificate.json`: the proof of an adapter that was written for mlx-lm."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from loraover.adapters.logits.judge import Certificate
from loraover.adapters.numerics.matrix_certificate import MatrixCertificate

CERTIFICATE_FILE = "mlx_certificate.json"


class MlxReport(Certificate):
    """Errors of the matrices of a written adapter, and the contents of `mlx_certificate.json`."""

    verdict: Literal["passed", "failed"] = Field(
        description='"passed" if every matrix is within its bound; mlx-lm was not run'
    )
    base_model: str = Field(description="Folder or hub name of the base model")
    architecture: str = Field(description="Model class of the base model in transformers")
    dtype: str = Field(description="Data type that the adapter is stored in: fp32, bf16 or fp16")
    rank: int = Field(description="Rank of every module; smaller ranks are padded with zeros")
    scaling: dict[str, float] = Field(description="Factor that B was multiplied by, by module")
    left_out: list[str] = Field(description="Tensors not written: copies of the base model's frozen weights")
    lost_settings: dict[str, Any] = Field(
        description="Entries that mlx-lm 0.32 needs at the top level of the base model's config.json, and that it lacks"
    )
    matrices: list[MatrixCertificate] = Field(description="One certificate for each A and each scaling * B")
    versions: dict[str, str] = Field(description="Versions of Python and packages, by name")
    hardware: str = Field(description="Processor and accelerator of the machine, in words")
