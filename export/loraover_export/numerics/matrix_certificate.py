"""The error of one written matrix, and its bound."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from loraover.checkpoint.error_bounds import smallest_subnormal, unit_roundoff
from loraover.checkpoint.exact_tensors import Exact
from loraover_export.numerics.rounding import underflow


class MatrixCertificate(BaseModel):
    """Error of one written matrix against its exact value: the contraction of its cores, or the stored value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="name of the matrix, such as model.layers.0.mlp.up_proj.lora_A")
    shape: tuple[int, int] = Field(description="rows and columns")
    over_parameterised: bool = Field(description="whether the matrix was trained as cores")
    relative_error: float = Field(
        description="Frobenius norm of the error over that of the matrix; 0 for a zero matrix"
    )
    relative_bound: float = Field(description="Frobenius norm of the elementwise bound over that of the matrix")
    worst_to_bound: float = Field(description="largest ratio of an element's error to its bound; at most 1 passes")
    flushed_to_zero: int = Field(description="number of non-zero elements that became zero in the storage type")
    subnormal: int = Field(description="number of elements stored as subnormals, which have fewer bits")

    @property
    def passed(self) -> bool:
        """Whether the error of every element is within its bound."""
        return self.worst_to_bound <= 1


def matrix_facts(matrices: Sequence[MatrixCertificate]) -> dict[str, str]:
    """Return rows of a model card that sum up many matrices."""
    return {
        "matrices": f"{sum(matrix.passed for matrix in matrices)} of {len(matrices)} within their bounds",
        "largest relative error": f"{max(matrix.relative_error for matrix in matrices):.2e}",
        "worst error / bound": f"{max(matrix.worst_to_bound for matrix in matrices):.3f}",
    }


def certify(name: str, written: Tensor, exact: Exact) -> MatrixCertificate:
    """Measure the error of a written matrix, and its bound: the contraction's, and one rounding to the storage type."""
    tiny = smallest_subnormal(written.dtype) / 2
    rounding = exact.value.abs().add_(exact.bound).mul_(unit_roundoff(written.dtype)).clamp_min_(tiny)
    bound = rounding.add_(exact.bound)
    error = (written.double() - exact.value).abs_()
    norm = float(exact.value.norm()) or 1.0
    lost = underflow(exact.value, written)
    m, n = exact.value.shape
    return MatrixCertificate(
        name=name,
        shape=(m, n),
        over_parameterised=exact.site is not None,
        relative_error=float(error.norm()) / norm,
        relative_bound=float(bound.norm()) / norm,
        worst_to_bound=float((error / bound).max()),
        flushed_to_zero=lost.to_zero,
        subnormal=lost.to_subnormal,
    )
