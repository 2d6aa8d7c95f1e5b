"""W + delta_W, computed in float64 and rounded once to the data type of W, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loraover.adapters.numerics.delta import Delta
from loraover.adapters.numerics.matrix_certificate import Errors, MatrixCertificate, certify_parts, measure
from loraover.adapters.numerics.rounding import round_nearest
from loraover.checkpoint.error_bounds import U64
from loraover.checkpoint.exact_tensors import Exact

BLOCK = 2**17
"""Elements that are merged at once, so that their numbers stay in the processor's cache."""


class WeightPart(NamedTuple):
    """Result for some rows.

    Args:
        errors: Errors of the written elements.
        squares: Sum of squares of delta_W.
        erased: Sum of squares of delta_W where the written element is that of the base model.
    """

    errors: Errors
    squares: float
    erased: float


def out_by_in(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a module's weight as (out, in): it is stored so in Linear, and as (in, out) in Conv1D and embeddings."""
    return weight if isinstance(module, nn.Linear) else weight.mT


def row_blocks(weight: Tensor, delta: Delta) -> Iterator[slice]:
    """Yield the rows of a weight (out_features, in_features) that are merged together."""
    m, n = weight.shape
    step = max(BLOCK // n, delta.rank)
    for start in range(0, m, step):
        yield slice(start, start + step)


@torch.no_grad()
def merge_rows(weight: Tensor, delta: Delta, rows: slice) -> WeightPart:
    """Replace some rows of a weight by W + delta_W, rounded to nearest; threads may merge other rows meanwhile.

    The bound of an element's error is that of the product, u64 |W + delta_W| for the sum, and one rounding.

    Raises:
        FoldError: An element beyond the range of the weight's data type.
    """
    product, before = delta.rows(rows).product(), weight[rows]
    value = product.value + before
    merged = Exact(value, product.bound.add_(value.abs(), alpha=U64), product.site)
    rounded = round_nearest(value, weight.dtype)
    squares = product.value.square_()
    erased = float(squares[rounded == before].sum())
    weight[rows] = rounded
    return WeightPart(measure(rounded, merged), float(squares.sum()), erased)


def certify_merge(delta: Delta, shape: tuple[int, int], parts: list[WeightPart]) -> MatrixCertificate:
    """Return the certificate of a merged weight of shape (out_features, in_features) from all its parts."""
    is_over = (delta.a.site or delta.b.site) is not None
    errors = [part.errors for part in parts]
    return certify_parts(f"{delta.module}.weight", shape, errors, over_parameterised=is_over)
