"""Contents of `merge_certificate.json`: the proof of a merge."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from loraover.adapters.logits.verdict import Certificate
from loraover.adapters.numerics.matrix_certificate import MatrixCertificate
from loraover.adapters.uniform.certificate import SourceRecord
from loraover.common.strict_json import StrictModel
from loraover_export.merge.rounding_loss import RoundingLoss


class MergedWeight(StrictModel):
    """Weight to which a delta was added."""

    matrix: MatrixCertificate = Field(description="Error of the written weight against W + delta_W in float64")
    dtype: str = Field(description="Data type of the weight, as safetensors spells it, such as BF16")
    delta_to_weight: float = Field(description="Frobenius norm of delta_W over that of W + delta_W")
    stored: RoundingLoss = Field(description="What rounding to that data type lost of delta_W")
    four_bit: RoundingLoss = Field(
        description="What a 4-bit quantiser (NF4, one scale for 64 elements) would lose of delta_W, measured on at "
        "most 256 rows of the weight"
    )


class MergeReport(Certificate):
    """Result of a merge, and the contents of `merge_certificate.json`."""

    verdict: Literal["passed", "failed"]
    base_model: str = Field(description="Folder or hub name of the base model")
    revision: str | None = Field(description="Commit of the base model on the hub; None for folders")
    source: SourceRecord = Field(description="Adapter that was merged")
    tensors: int = Field(description="Number of tensors in the merged model's files")
    replaced: list[str] = Field(description="Parameters that the adapter holds in full, and that replace the base's")
    untied: list[str] = Field(description="Weights that shared one tensor in the base model, and no longer do")
    stored: RoundingLoss = Field(description="What rounding to the storage type lost of all deltas together")
    four_bit: RoundingLoss = Field(description="What a 4-bit quantiser would lose of all deltas together")
    weights: list[MergedWeight] = Field(description="One entry for each weight to which a delta was added")
    versions: dict[str, str] = Field(description="Versions of Python and packages, by name")
    hardware: str = Field(description="Processor and accelerator of the machine, in words")
