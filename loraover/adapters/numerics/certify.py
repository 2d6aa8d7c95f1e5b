"""The error of one written matrix against its exact value, measured with PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loraover.adapters.numerics.matrix_certificate import Errors, MatrixCertificate, Underflow, certify_parts
from loraover.adapters.numerics.rounding import underflow
from loraover.checkpoint.error_bounds import U32, smallest_subnormal, unit_roundoff
from loraover.checkpoint.exact_tensors import Exact
from loraover.checkpoint.tensor_file import extreme_sizes, have_same_bits

DIVISION = 2 * U32
"""Largest relative amount by which a quotient in float32 may be too small."""

SMALL_NORM = 1e-10
"""Norm of a matrix whose squares may leave float32's range."""


def certify(name: str, written: Tensor, exact: Exact) -> MatrixCertificate:
    """Measure the error of a written matrix, and its bound: the contraction's, and one rounding to the storage type."""
    m, n = exact.value.shape
    if _is_kept(written, exact.value):
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


def _is_kept(written: Tensor, value: Tensor) -> bool:
    """Whether a stored matrix was written bit for bit, and is of normal numbers, whose bounds are u |element|."""
    if not written.dtype == value.dtype != torch.float64 or value.numel() == 0:
        return False
    if written is not value and not have_same_bits(written, value):
        return False
    smallest, largest = extreme_sizes(value)
    return smallest >= torch.finfo(value.dtype).smallest_normal and math.isfinite(largest)


def measure(written: Tensor, exact: Exact) -> Errors:
    """Measure the errors of written elements against their exact values."""
    stored = exact.value.dtype != torch.float64
    return (_errors_of_stored(written, exact.value.float()) if stored else None) or _errors(written, exact)


def _errors(written: Tensor, exact: Exact) -> Errors:
    value = exact.value.double()
    tiny = smallest_subnormal(written.dtype) / 2
    rounding = value.abs().add_(exact.bound).mul_(unit_roundoff(written.dtype)).clamp_min_(tiny)
    bound = rounding.add_(exact.bound)
    error = (written.double() - value).abs_()
    lost = underflow(value, written)
    return Errors(float(value.norm()), float(error.norm()), float(bound.norm()), float(error.div_(bound).amax()), lost)


def _errors_of_stored(written: Tensor, value: Tensor) -> Errors | None:
    """Return the errors of a stored matrix, in float32 and without a bound of its own; None where it has none there.

    An error is exact: it is a multiple of the element's last bit, and at most the element itself, since zero is a
    number of the storage type. Its bound is u max(|element|, smallest normal number).
    """
    u, normal = unit_roundoff(written.dtype), torch.finfo(written.dtype).smallest_normal
    size = value.abs()
    error = written - value  # in float32
    norm, error_norm = (float(torch.linalg.vector_norm(x)) for x in (value, error))
    if not SMALL_NORM < norm < math.inf or float(size.amin()) < normal:
        return None  # squares leave float32's range, or elements are subnormal: rare, and worth a closer look
    worst = float(error.abs_().div_(size).amax()) / u if error.any() else 0.0
    return Errors(norm, error_norm, u * norm, worst * (1 + DIVISION), Underflow())
