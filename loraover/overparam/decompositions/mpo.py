"""Matrix product operator: the paper's decomposition and the default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import lru_cache
from math import ceil, prod
from typing import TYPE_CHECKING, Annotated, Literal, cast, final

import numpy as np
from pydantic import Field, StrictInt, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from loraover.common.arrays import Array
from loraover.common.errors import ShapeError
from loraover.common.later import torch
from loraover.overparam.decompositions.base import MAX_CORES, Decomposition, Ratio, random_coisometry
from loraover.overparam.decompositions.contraction_order import CoreShapes, apply_chain, cheapest_order

if TYPE_CHECKING:
    from torch import Tensor

Modes = Mapping[int, tuple[StrictInt, ...]]


@final
@dataclass(frozen=True)
class Mpo(Decomposition):
    """M[i_1..i_K, j_1..j_K] = C_1[i_1, j_1] C_2[i_2, j_2] ... C_K[i_K, j_K].

    m = prod m_k and n = prod n_k; core k has shape (R_k, m_k, n_k, R_{k+1}), with R_1 = R_{K+1} = 1. The m_k and n_k
    are the *modes*, the R_k the *bonds*. The auxiliary cores surround one centre core, which is the largest. Left of
    the centre the cores contract to P with P P^T = I, right of it to Q with Q Q^T = I, and the centre is P^T M Q. In
    this mixed-canonical gauge, a change of the centre moves M by no more than itself.

    Every bond is at least full (the product of the modes on its smaller side), so that the cores can represent every
    matrix; wider bonds add parameters.

    Args:
        num_cores: Number of cores, K.
        modes: Factors of dimensions by their size, e.g. {8: (2, 2, 2), 576: (8, 9, 8)}; other sizes are split as
            evenly as their prime factors allow.
        bonds: The K - 1 inner bond dimensions; absent: full bonds, or what `expansion` asks for.
        expansion: Smallest ratio of parameters to m * n; bonds are widened until it is met. Absent: full bonds, which
            give 1.01 to 1.3 with three cores and usual LoRA shapes.
        gauge: Start of P and Q. "identity" makes them identities where bonds are full, so that the centre's elements
            are M's elements, and an optimizer that scales each element separately (Adam) works along the same axes as
            in plain LoRA. "random" draws them from the Haar measure, as wider bonds need in any case.

    Source:
        Oseledets 2011, doi:10.1137/090752286; Gao et al. 2023 (OPF), section 3. They split M by SVDs. Our auxiliary
        cores do not depend on M, so that a zero matrix needs no special treatment, and every M is still represented.
    """

    num_cores: Annotated[int, Field(strict=True, ge=1, le=MAX_CORES)] = 3
    modes: Modes = field(default_factory=dict)
    bonds: tuple[StrictInt, ...] | None = None
    expansion: Ratio | None = None
    gauge: Literal["identity", "random"] = "identity"
    name: Literal["mpo"] = field(default="mpo", repr=False, kw_only=True)

    @field_validator("modes")
    @classmethod
    def _multiply_to_their_size(cls, modes: Modes, info: ValidationInfo) -> Modes:
        cores = info.data.get("num_cores")  # absent if it is faulty; so are the other fields
        faults = [
            f"modes[{size}] is {split}, expected {cores} factors of {size}"
            for size, split in modes.items()
            if cores is not None and (len(split) != cores or min(split) < 1 or prod(split) != size)
        ]
        if faults:
            raise ValueError("; ".join(faults))
        return modes

    @field_validator("bonds")
    @classmethod
    def _lie_between_cores(cls, bonds: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        inner = info.data.get("num_cores", 0) - 1
        if bonds is not None and inner >= 0 and len(bonds) != inner:
            raise ValueError(f"bonds is {bonds}, expected num_cores - 1 = {inner} integers")
        return bonds

    @field_validator("expansion")
    @classmethod
    def _has_bonds_to_widen(cls, expansion: float | None, info: ValidationInfo) -> float | None:
        if expansion is not None and info.data.get("bonds") is not None:
            raise ValueError("bonds and expansion exclude each other: expansion chooses the bonds")
        if expansion is not None and info.data.get("num_cores") == 1:
            raise ValueError("expansion needs num_cores of at least 2: one core has no bond to widen")
        return expansion

    def __hash__(self) -> int:
        return hash((self.num_cores, tuple(sorted(self.modes.items())), self.bonds, self.expansion, self.gauge))

    def layout(self, m: int, n: int) -> CoreShapes:
        """Return the modes and bonds for an m x n matrix; a ShapeError if a bond cannot represent every matrix."""
        return _layout(self, m, n)

    def core_shapes(self, m: int, n: int) -> tuple[tuple[int, int], ...]:
        layout = self.layout(m, n)
        return tuple(_unfolding(layout, k) for k in range(self.num_cores))

    def centre(self, m: int, n: int) -> int:
        return self.layout(m, n).centre

    def init_one(self, matrix: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        layout = self.layout(*matrix.shape)
        cores: list[Tensor] = [matrix] * self.num_cores

        # P_k spans the modes of cores 1..k; core k = (P_{k-1}^T (x) I) P_k makes the chain telescope.
        left = matrix.new_ones(1, 1)
        for k in range(layout.centre):
            _, rows, columns, next_bond = layout.core(k)
            outer = self._coisometry(generator, left.shape[0] * rows * columns, next_bond)
            cores[k] = left.mT @ outer.reshape(left.shape[0], -1)
            left = outer
        right = matrix.new_ones(1, 1)
        for k in range(self.num_cores - 1, layout.centre, -1):
            bond, rows, columns, _ = layout.core(k)
            outer = self._coisometry(generator, rows * columns * right.shape[0], bond)
            cores[k] = outer.mT.reshape(-1, right.shape[0]) @ right
            right = outer

        tensor = _interleave(matrix.unsqueeze(0), layout).reshape(left.shape[0], -1, right.shape[0])
        cores[layout.centre] = torch.einsum("pb,pcq,qd->bcd", left, tensor, right)
        return tuple(core.reshape(_unfolding(layout, k)) for k, core in enumerate(cores))

    def _coisometry(self, generator: torch.Generator, rows: int, columns: int) -> Tensor:
        if self.gauge == "identity" and rows == columns:
            return torch.eye(rows, dtype=torch.float64)
        return random_coisometry(generator, rows, columns)

    def contract(self, cores: Sequence[Tensor], m: int, n: int) -> Tensor:
        self.check(cores, m, n)
        layout = self.layout(m, n)
        group, k_centre, last = cores[0].shape[0], layout.centre, self.num_cores - 1

        left = _fold_right(cores[:k_centre], layout, 0)
        product = cores[k_centre].reshape(group, layout.bonds[k_centre], -1)
        if left is not None:
            product = left @ product
        right = _fold_right(cores[k_centre + 1 :], layout, k_centre + 1)
        if k_centre < last and right is not None:
            bond = layout.bonds[k_centre + 1]
            product = product.reshape(group, -1, bond) @ right.reshape(group, bond, -1)
        return _deinterleave(product, layout)

    def apply(self, cores: Sequence[Tensor], x: Tensor, m: int, n: int) -> Tensor:
        self.check(cores, m, n)
        layout = self.layout(m, n)
        return apply_chain(layout, [core.reshape(-1, *layout.core(k)) for k, core in enumerate(cores)], x)

    def frames(self, cores: Sequence[Tensor], m: int, n: int) -> tuple[Tensor, Tensor]:
        layout = self.layout(m, n)
        left = _fold_right(cores[: layout.centre], layout, 0)
        right = _fold_right(cores[layout.centre + 1 :], layout, layout.centre + 1)
        one = cores[0].new_ones(len(cores[0]), 1, 1)
        if right is not None:
            right = right.reshape(len(right), layout.bonds[layout.centre + 1], -1)
        return one if left is None else left, one if right is None else right

    def to_centre(self, cores: Sequence[Tensor], matrices: Tensor, m: int, n: int, *, squared: bool = False) -> Tensor:
        layout = self.layout(m, n)
        left, right = (frame.square() if squared else frame for frame in self.frames(cores, m, n))
        tensors = _interleave(matrices, layout).reshape(len(matrices), left.shape[1], -1, right.shape[2])
        centre = torch.einsum("gpb,gpcq,gdq->gbcd", left, tensors, right)
        return centre.reshape(len(matrices), *_unfolding(layout, layout.centre))

    def multiplications(self, m: int, n: int, tokens: int) -> int:
        return cheapest_order(self.layout(m, n), tokens).multiplications

    def contraction_terms(self, m: int, n: int) -> int:
        return sum(self.layout(m, n).bonds[1:-1]) + self.num_cores


def _fold_right(cores: Sequence[Tensor], layout: CoreShapes, first: int) -> Tensor | None:
    """Contract neighbouring cores to (G, R_first * modes, R_{last + 1}); None if there are none."""
    product = None
    for k, core in enumerate(cores, first):
        bond = layout.bonds[k]
        following = core.reshape(core.shape[0], bond, -1)
        product = following if product is None else product.reshape(core.shape[0], -1, bond) @ following
    return None if product is None else product.reshape(product.shape[0], -1, layout.bonds[first + len(cores)])


def _unfolding(layout: CoreShapes, k: int) -> tuple[int, int]:
    """Return the 2-D shape of core k, unfolded towards the centre core."""
    bond, rows, columns, next_bond = layout.core(k)
    if k < layout.centre:
        return bond * rows * columns, next_bond
    if k > layout.centre:
        return bond, rows * columns * next_bond
    return bond * rows, columns * next_bond


def _interleave(matrices: Tensor, layout: CoreShapes) -> Tensor:
    """Reorder (G, m, n) to (G, m_1, n_1, m_2, n_2, ...)."""
    count = len(layout.rows)
    split = matrices.reshape(-1, *layout.rows, *layout.columns)
    return split.permute(0, *(d for k in range(count) for d in (1 + k, 1 + count + k)))


def _deinterleave(product: Tensor, layout: CoreShapes) -> Tensor:
    """Reorder (G, m_1 n_1 m_2 n_2 ...) to (G, m, n)."""
    count = len(layout.rows)
    split = product.reshape(-1, *(d for pair in zip(layout.rows, layout.columns, strict=True) for d in pair))
    order = [1 + 2 * k for k in range(count)] + [2 + 2 * k for k in range(count)]
    m, n = prod(layout.rows), prod(layout.columns)
    if isinstance(split, np.ndarray):
        return cast("Tensor", _deinterleaved_array(split, layout, order))
    if layout.columns[-1] == 2 and split.device.type == "cpu" and split.dtype in (torch.float32, torch.float64):
        # A CPU copies two by two ten times as slowly as it first copies the last two modes together, then pairs.
        *rows, last_row = order[:count]
        *columns, last_column = order[count:]
        together = split.permute(0, *rows, *columns, last_row, last_column)
        pairs = torch.view_as_complex(together.reshape(-1, m // layout.rows[-1], n // 2, layout.rows[-1], 2))
        return torch.view_as_real(pairs.transpose(2, 3).contiguous()).reshape(-1, m, n)
    return split.permute(0, *order).reshape(-1, m, n)


def _deinterleaved_array(split: Array, layout: CoreShapes, order: list[int]) -> Array:
    """Do the work of `_deinterleave` by NumPy; see there for the pairs."""
    m, n = prod(layout.rows), prod(layout.columns)
    if layout.columns[-1] != 2:
        return split.transpose(0, *order).reshape(-1, m, n)
    count = len(layout.rows)
    *rows, last_row = order[:count]
    *columns, last_column = order[count:]
    together = np.ascontiguousarray(split.transpose(0, *rows, *columns, last_row, last_column))
    pairs: Array = together.view(np.complex64 if split.dtype == np.float32 else np.complex128)
    pairs = pairs.reshape(-1, m // layout.rows[-1], n // 2, layout.rows[-1]).swapaxes(2, 3)
    return np.ascontiguousarray(pairs).view(split.dtype).reshape(-1, m, n)


@lru_cache(maxsize=4096)
def _layout(mpo: Mpo, m: int, n: int) -> CoreShapes:
    if m < 1 or n < 1:
        raise ShapeError(f"mpo: expected a matrix with at least one row and one column, found {m} x {n}.")
    rows = mpo.modes.get(m) or balanced_factors(m, mpo.num_cores)
    columns = mpo.modes.get(n) or balanced_factors(n, mpo.num_cores)
    rows, columns = tuple(rows), tuple(columns)
    sizes = [a * b for a, b in zip(rows, columns, strict=True)]
    cuts = range(1, mpo.num_cores)
    full = (1, *(min(prod(sizes[:k]), prod(sizes[k:])) for k in cuts), 1)
    minimal = CoreShapes(rows, columns, full, 0)
    centre = max(range(mpo.num_cores), key=lambda k: (prod(minimal.core(k)), -abs(2 * k + 1 - mpo.num_cores)))

    if mpo.bonds is not None:
        bonds = (1, *mpo.bonds, 1)
        narrow = [f"bond {k} is {bonds[k]}, full is {full[k]}" for k in cuts if bonds[k] < full[k]]
        if narrow:
            raise ShapeError(
                f"mpo: {'; '.join(narrow)} for a {m} x {n} matrix with row modes {rows} and column modes "
                f"{columns}; narrower bonds would truncate the matrix. Widen them or leave them out."
            )
        return CoreShapes(rows, columns, bonds, centre)
    layout = CoreShapes(rows, columns, full, centre)
    step = 0
    while mpo.expansion is not None and layout.num_parameters() < mpo.expansion * m * n:
        step += 1
        widened = (1, *(ceil(full[k] * (1 + step / 64)) for k in cuts), 1)
        layout = CoreShapes(rows, columns, widened, centre)
    return layout


def balanced_factors(size: int, count: int) -> tuple[int, ...]:
    """Split `size` into `count` factors, as even as its prime factors allow, the largest in the middle."""
    primes, divisor, left = [], 2, size
    while divisor * divisor <= left:
        while left % divisor == 0:
            primes.append(divisor)
            left //= divisor
        divisor += 1
    factors = [1] * count
    for prime in sorted(primes + ([left] if left > 1 else []), reverse=True):
        factors[factors.index(min(factors))] *= prime
    factors.sort(reverse=True)
    middle_out = sorted(range(count), key=lambda k: abs(2 * k + 1 - count))
    placed = dict(zip(middle_out, factors, strict=True))
    return tuple(placed[k] for k in range(count))
