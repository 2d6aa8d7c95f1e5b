"""W + delta_W, computed in float64 and rounded once to the data type of W, and the share of delta_W that remains.

A number of the storage type stands for all numbers near it. Where delta_W is smaller than half their spacing, W +
delta_W is stored as W, and that part of the adapter is lost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from loraover.adapters.numerics.delta import Delta, read_deltas
from loraover.adapters.numerics.matrix_certificate import Errors, MatrixCertificate, certify_parts, measure
from loraover.adapters.numerics.tensor_rounding import round_nearest
from loraover.checkpoint.base_modules import load_others, target_module
from loraover.checkpoint.error_bounds import U64
from loraover.checkpoint.exact_tensors import ExactArray
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.common.arrays import as_array
from loraover.common.strict_json import StrictModel
from loraover.common.threads import workers

BLOCK = 2**17
"""Elements that are merged at once, so that their numbers stay in the processor's cache."""

ROWS = 256
"""Rows of each weight on which the quantiser is tried, evenly spaced."""

BLOCKSIZE = 64
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 numbers of the 4-bit NormalFloat. Source: Dettmers et al. 2023, arXiv:2305.14314, appendix E."""


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
    """
    product, before = delta.rows(rows).product(), weight[rows]
    value = product.value + before
    bound = product.bound.add_(value.abs(), alpha=U64)
    merged = ExactArray(as_array(value), as_array(bound), product.site)
    rounded = round_nearest(value, weight.dtype)
    squares = product.value.square_()
    erased = float(squares[rounded == before].sum())
    weight[rows] = rounded
    return WeightPart(measure(as_array(rounded), merged), float(squares.sum()), erased)


def certify_merge(delta: Delta, shape: tuple[int, int], parts: list[WeightPart]) -> MatrixCertificate:
    """Return the certificate of a merged weight of shape (out_features, in_features) from all its parts."""
    is_over = (delta.a.site or delta.b.site) is not None
    errors = [part.errors for part in parts]
    return certify_parts(f"{delta.module}.weight", shape, errors, over_parameterised=is_over)


@torch.no_grad()
def merge(model: Any, adapter: AdapterDir, deltas: Iterable[Delta] | None = None) -> list[MatrixCertificate]:
    """Replace each adapted weight by W + delta_W, computed in float64 and rounded once to the weights' dtype.

    A weight that other modules share (an embedding tied to the head) is copied first, and the model's
    configuration then states that they are no longer tied.

    Args:
        model: The base model, a transformers PreTrainedModel; it is changed.
        adapter: Adapter with the deltas and other trained parameters.
        deltas: The adapter's deltas, if they have been read already; None reads them.

    Returns:
        One certificate for each module: the error of the written weight against float64, and its bound, which is the
        product's bound, u64 |W + delta_W| for the sum, and one rounding.

    Raises:
        CheckpointError: The adapter belongs to another base model.
        FoldError: A weight beyond the range of its dtype.
    """
    tied = _is_tied(model)
    with adapter.open() as exact:
        load_others(model, exact)
    holders = Counter(id(module._parameters.get("weight")) for module in model.modules())
    with workers() as threads:
        merges = []
        for delta in read_deltas(adapter) if deltas is None else deltas:
            module: Any = target_module(model, adapter, delta.module)
            if holders[id(module.weight)] > 1:
                module.weight = nn.Parameter(module.weight.clone(), requires_grad=False)
            merges.append(threads.start(_add, out_by_in(module, module.weight), delta))
        certificates = [merge.result() for merge in merges]
    if tied and not _is_tied(model):
        model.config.tie_word_embeddings = False
    return certificates


def _add(weight: Tensor, delta: Delta) -> MatrixCertificate:
    m, n = weight.shape
    return certify_merge(delta, (m, n), [merge_rows(weight, delta, rows) for rows in row_blocks(weight, delta)])


def _is_tied(model: Any) -> bool:
    """Whether head and embedding share their weight."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


class RoundingLoss(StrictModel):
    """Effect of storage on the deltas of one or more weights."""

    erased: float = Field(
        description="Share of the delta's squared norm in elements that are stored as they were in the base model"
    )
    error: float = Field(
        description="Norm of the change that storage makes to the delta, over the norm of the delta; 1 means that the "
        "error is as large as the delta"
    )


class Lost:
    """Sums of squares from which an `RoundingLoss` is made, over one or more weights."""

    def __init__(self) -> None:
        self.squares = self.erased = self.errors = 0.0

    def add(self, other: Lost) -> None:
        """Add the sums of another weight."""
        self.squares += other.squares
        self.erased += other.erased
        self.errors += other.errors

    def result(self) -> RoundingLoss:
        """Return the shares; 0 for a delta of zero."""
        squares = self.squares or 1.0
        return RoundingLoss(erased=self.erased / squares, error=math.sqrt(self.errors / squares))


def lost_by_rounding(parts: list[WeightPart]) -> Lost:
    """Return the loss of delta_W by rounding W + delta_W once; W alone is exact in the storage type."""
    lost = Lost()
    for part in parts:
        lost.squares += part.squares
        lost.erased += part.erased
        lost.errors += part.errors.error**2
    return lost


@torch.no_grad()
def lost_by_four_bits(weight: Tensor, delta: Delta) -> Lost:
    """Return the loss of delta_W by quantising: Q(W + delta_W) - Q(W) is compared with delta_W.

    Q is the 4-bit NormalFloat with one scale, the largest absolute value, for each 64 elements of a row, as in
    bitsandbytes. It is tried on at most ROWS rows, and their sums are scaled to all rows.
    """
    rows = slice(0, None, math.ceil(len(weight) / ROWS))
    before, change = weight[rows].double(), delta.rows(rows).product().value
    old, new = four_bits(before), four_bits(before + change)
    each = len(weight) / len(before)  # rows of the weight that each of these rows stands for
    lost = Lost()
    lost.squares = each * float(change.square().sum())
    lost.erased = each * float(change[new == old].square().sum())
    lost.errors = each * float((new - old - change).square().sum())
    return lost


def four_bits(weight: Tensor) -> Tensor:
    """Round each element to the nearest of 16 numbers times the largest absolute value of its block of a row."""
    m, n = weight.shape
    blocks = pad(weight, (0, -n % BLOCKSIZE)).view(m, -1, BLOCKSIZE)
    scales = blocks.abs().amax(-1, keepdim=True)
    shares = blocks / scales.clamp_min(torch.finfo(weight.dtype).tiny)
    levels = torch.tensor(NF4, dtype=weight.dtype)
    nearest = torch.bucketize(shares.contiguous(), (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scales).view(m, -1)[:, :n]
