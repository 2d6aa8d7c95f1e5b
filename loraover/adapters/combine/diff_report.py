"""Result of a comparison of two adapters."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from loraover.adapters.logits.deviation import Deviation
from loraover.common.strict_json import StrictModel


class ModuleDiff(StrictModel):
    """Comparison of the deltas of one module."""

    module: str = Field(description="Path of the module in the base model")
    ranks: tuple[int, int] = Field(description="Numerical rank of each delta; 0 if it is zero or missing")
    norms: tuple[float, float] = Field(description="Frobenius norm of each delta; 0 if it is missing")
    difference: float = Field(description="Frobenius norm of the difference of the deltas")
    column_angles: list[float] = Field(
        description="Principal angles between the column spaces of the deltas, in degrees, the smallest first; empty "
        "if one of them is zero or missing"
    )
    row_angles: list[float] = Field(
        description="Principal angles between the row spaces of the deltas, in degrees, the smallest first"
    )

    @property
    def relative_difference(self) -> float:
        """Norm of the difference over the larger norm of the two deltas; 0 if both are zero."""
        return self.difference / (max(self.norms) or 1.0)


class LogitDiff(StrictModel):
    """Comparison of the logits of two adapters on the base model."""

    base: str = Field(description="Base model that was run, in words")
    device: str = Field(description="Device that it ran on")
    compute_dtype: str = Field(description="Data type that it ran in: fp32, bf16, fp16 or fp64")
    tokens: int = Field(description="Number of tokens in all prompts")
    prompt_source: str = Field(description="Where the prompts come from, in words")
    difference: Deviation = Field(description="Distance of the second adapter's logits from the first one's")
    effects: tuple[Deviation, Deviation] = Field(
        description="Distance of the base model's logits from those of each adapter"
    )


class DiffReport(StrictModel):
    """Comparison of two adapters."""

    schema_version: int = 1
    first: str = Field(description="Folder of the first adapter")
    second: str = Field(description="Folder of the second adapter")
    base_model: str | None = Field(description="Base model that the adapters name; None if they name none")
    norms: tuple[float, float] = Field(description="Frobenius norm of all deltas of each adapter together")
    difference: float = Field(description="Frobenius norm of the differences of all deltas together")
    modules: list[ModuleDiff] = Field(description="One entry for each module that either adapter has a delta for")
    other_tensors: list[str] = Field(
        description="Parameters that the adapters hold in full, and that differ or that only one of them has"
    )
    logits: LogitDiff | None = Field(description="Comparison of the logits; None if it was not asked for")
    versions: dict[str, str] = Field(description="Versions of Python and packages, by name")
    hardware: str = Field(description="Processor and accelerator of the machine, in words")

    exit_code: ClassVar[int] = 0
    """Exit code of the command, which judges nothing."""

    @property
    def relative_difference(self) -> float:
        """Norm of all differences over the larger norm of the two adapters; 0 if both are zero."""
        return self.difference / (max(self.norms) or 1.0)
