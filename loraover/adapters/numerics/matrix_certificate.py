"""The certificate of one written matrix: its error against the exact value, and the bound of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pydantic import Field

from loraover.checkpoint.error_bounds import U32, format_of, smallest_subnormal, unit_roundoff
from loraover.checkpoint.exact_tensors import ExactArray
from loraover.common.arrays import Array, calculable, extreme_sizes, have_same_bits, widened
from loraover.common.strict_json import StrictModel

LARGEST_LOSS = 0.5
"""Largest relative error of a matrix that passes.

Rounding gives 2^-9 at most, so more is a loss to underflow, which the bounds of the elements allow.
"""


class MatrixCertificate(StrictModel):
    """Error of one written matrix against its exact value: the contraction of its cores, or the stored value."""

    name: str = Field(description="Name of the matrix, such as model.layers.0.mlp.up_proj.lora_A")
    shape: tuple[int, int] = Field(description="Rows and columns")
    over_parameterised: bool = Field(description="Whether the matrix was trained as cores")
    relative_error: float = Field(
        description="Frobenius norm of the error over that of the matrix; 0 for a zero matrix; above 0.5, underflow "
        "has left less than half of it, which fails"
    )
    relative_bound: float = Field(description="Frobenius norm of the elementwise bound over that of the matrix")
    worst_to_bound: float = Field(description="Largest ratio of an element's error to its bound; at most 1 passes")
    flushed_to_zero: int = Field(description="Number of non-zero elements that became zero in the storage type")
    subnormal: int = Field(description="Number of elements stored as subnormals, which have fewer bits")

    @property
    def passed(self) -> bool:
        """Whether the error of every element is within its bound, and underflow has left most of the matrix."""
        return self.worst_to_bound <= 1 and not self.is_lost

    @property
    def is_lost(self) -> bool:
        """Whether underflow took more than half of the matrix's norm."""
        return self.relative_error > LARGEST_LOSS


def matrix_facts(matrices: Sequence[MatrixCertificate]) -> dict[str, str]:
    """Return rows of a model card that sum up many matrices."""
    worst = float(np.max([matrix.worst_to_bound for matrix in matrices]))  # NaN if there is one
    return {
        "matrices": f"{sum(matrix.passed for matrix in matrices)} of {len(matrices)} within their bounds",
        "largest relative error": f"{max(matrix.relative_error for matrix in matrices):.2e}",
        **({} if worst <= 1 else {"worst error / bound": f"{worst:.3f}"}),  # that of a right rounding is about 1
        **underflow_facts(matrices),
    }


def underflow_facts(matrices: Sequence[MatrixCertificate]) -> dict[str, str]:
    """Return the row of `matrix_facts` with the number of elements that are too small for the storage type, if any."""
    zero, subnormal = sum(m.flushed_to_zero for m in matrices), sum(m.subnormal for m in matrices)
    if not zero and not subnormal:
        return {}
    lost = sum(matrix.is_lost for matrix in matrices)
    remedy = f"; {lost} lost more than half of their norm, which a type of wider range such as bf16 keeps"
    return {"underflow": f"{zero} elements became zero, {subnormal} are subnormal with fewer bits{remedy * bool(lost)}"}


@dataclass(frozen=True)
class Underflow:
    """Numbers of non-zero elements that became zero, or subnormals, because they are small for their type."""

    to_zero: int = 0
    to_subnormal: int = 0


class Errors(NamedTuple):
    """Errors of a matrix, or of some of its rows, in the order of the fields of a certificate.

    Args:
        norm: Frobenius norm of the exact elements.
        error: Frobenius norm of the errors.
        bound: Frobenius norm of the bounds.
        worst: Largest ratio of an error to its bound.
        lost: Numbers of elements that underflow made zero or subnormal.
    """

    norm: float
    error: float
    bound: float
    worst: float
    lost: Underflow


def certify_parts(
    name: str, shape: tuple[int, int], parts: Sequence[Errors], *, over_parameterised: bool
) -> MatrixCertificate:
    """Return the certificate of a matrix from the errors of its parts."""
    norm, error, bound = (math.hypot(*sizes) for sizes in zip(*(part[:3] for part in parts), strict=True))
    flushed = sum(part.lost.to_zero for part in parts)
    return MatrixCertificate(
        name=name,
        shape=shape,
        over_parameterised=over_parameterised,
        relative_error=error / norm if norm else float(flushed > 0),  # the squares of all elements may vanish
        relative_bound=bound / (norm or 1.0),
        worst_to_bound=float(np.max([part.worst for part in parts])),  # NaN if there is one
        flushed_to_zero=flushed,
        subnormal=sum(part.lost.to_subnormal for part in parts),
    )


DIVISION = 2 * U32
"""Largest relative amount by which a quotient in float32 may be too small."""

SMALL_NORM = 1e-10
"""Norm of a matrix whose squares may leave float32's range."""


def certify(name: str, written: Array, exact: ExactArray) -> MatrixCertificate:
    """Measure the error of a written matrix, and its bound: the contraction's, and one rounding to the storage type.

    A stored matrix of normal numbers that was written bit for bit has no error, and the bounds u |element|.
    """
    value = exact.value
    m, n = value.shape
    is_kept = written.dtype == value.dtype != np.float64 and value.size > 0
    if is_kept and (written is value or have_same_bits(written, value)):
        smallest, largest = extreme_sizes(value)
        if smallest >= format_of(value.dtype).normal and math.isfinite(largest):
            return MatrixCertificate(
                name=name,
                shape=(m, n),
                over_parameterised=False,
                relative_error=0.0,
                relative_bound=unit_roundoff(written.dtype),
                worst_to_bound=0.0,
                flushed_to_zero=0,
                subnormal=0,
            )
    return certify_parts(name, (m, n), [measure(written, exact)], over_parameterised=exact.site is not None)


def measure(written: Array, exact: ExactArray) -> Errors:
    """Measure the errors of written elements against their exact values; those of a stored matrix in float32."""
    if exact.value.dtype != np.float64:
        found = _errors_of_stored(written, widened(exact.value, np.float32))
        if found is not None:
            return found
    value = widened(exact.value)
    bound = np.abs(value)
    if exact.bound is not None:
        bound += exact.bound
    bound *= unit_roundoff(written.dtype)
    least = smallest_subnormal(written.dtype) / 2
    if float(bound.min(initial=least)) < least:
        np.maximum(bound, least, out=bound)
    if exact.bound is not None:
        bound += exact.bound
    error = calculable(written) - value
    np.abs(error, out=error)
    norms = norm_of(value), norm_of(error), norm_of(bound)
    error /= bound
    return Errors(*norms, float(error.max()), underflow(value, written))


def norm_of(x: Array) -> float:
    """Return the Frobenius norm of an array of float32 or float64, in its type."""
    with np.errstate(over="ignore"):  # infinity is for the caller to see
        return float(np.linalg.norm(x.reshape(-1)))


def _errors_of_stored(written: Array, value: Array) -> Errors | None:
    """Return the errors of a stored matrix, whose bounds are u max(|element|, smallest normal); None if out of range.

    An error is exact in float32: a multiple of the element's last bit, and at most the element, as zero is stored too.
    """
    u, normal = unit_roundoff(written.dtype), format_of(written.dtype).normal
    size = np.abs(value)
    error = widened(written, np.float32) - value
    norm, error_norm = norm_of(value), norm_of(error)
    if not SMALL_NORM < norm < math.inf or float(size.min()) < normal:
        return None  # squares leave float32's range, or elements are subnormal: rare, and worth a closer look
    np.abs(error, out=error)
    error /= size
    return Errors(norm, error_norm, u * norm, float(error.max()) / u * (1 + DIVISION), Underflow())


def underflow(x: Array, rounded: Array) -> Underflow:
    """Count the elements of `x` that became zero or subnormal in `rounded`."""
    kind = np.float64 if rounded.dtype == np.float64 else np.float32
    tiny, size = format_of(rounded.dtype).normal, np.abs(widened(rounded, kind))
    if size.size > 0 and float(size.min()) >= tiny:
        return Underflow()
    is_zero = size == 0
    return Underflow(int((is_zero & (x != 0)).sum()), int((~is_zero & (size < tiny)).sum()))
