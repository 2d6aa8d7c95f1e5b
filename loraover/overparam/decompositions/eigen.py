"""A matrix in the eigenbases of second moments: the gauge that an optimizer with a diagonal scaling profits from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Annotated, Literal, final

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from loraover.overparam.block_bases import Bases, Blocks, Side, turn
from loraover.overparam.decompositions.base import MAX_BLOCK, Decomposition, MomentRule, Source

WHOLE_SHORT_SIDE = 256
"""Largest shorter side whose basis is one block."""


@final
@dataclass(frozen=True)
class Eigen(Decomposition):
    """M = U Z V^T with orthogonal, block-diagonal U and V, which follow second moments and are not stepped.

    The optimizer steps the centre core Z, of M's shape. With U and V from the eigenvectors of E[G G^T] and E[G^T G],
    where G = dL/dM, Adam's scaling of single elements of Z is SOAP's preconditioning of M, block-diagonal on the longer
    side; with V from the covariance of a layer's inputs or of its output's gradients, measured before the first step,
    it is K-FAC's eigenbasis. What it changes are the axes that Adam scales. It adds no trained number, unless
    `train_auxiliary` is set.

    A basis is kept as (count * size, size), its blocks below one another. A shorter side of at most 256 is one block.

    Args:
        short: Where the basis of the shorter side comes from: gradients of the run, calibration batches before it, or
            none (the identity).
        long: Where the basis of the longer side comes from.
        block: Largest length of a block.
        refresh: Optimizer steps with a gradient until a basis is first computed from gradients.
        growth: Factor from one refresh to the next, in steps; 1 refreshes every `refresh` steps. Absent: only once.
        decay: Share of the running mean of second moments that stays at each step.
        second_moments: What happens to the optimizer's squared gradients at a later refresh: "kept" as they are, or
            "carried" by the squares of the rotation. The first refresh always carries them.
        train_auxiliary: Let the optimizer step U and V too, from where calibration has put them; they do not stay
            orthogonal.
    Source: Vyas et al. 2024 (SOAP), arXiv:2409.11321, algorithm 3; George et al. 2018 (EKFAC), arXiv:1806.03884.
    """

    short: Source = "gradient"
    long: Source = "gradient"
    block: Annotated[int, Field(strict=True, ge=1, le=MAX_BLOCK)] = 64
    refresh: Annotated[int, Field(strict=True, ge=1)] = 1
    growth: Annotated[float, Field(strict=True, ge=1, le=1000)] | None = 1.5
    decay: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.95
    second_moments: Literal["kept", "carried"] = "kept"
    train_auxiliary: bool = False
    name: Literal["eigen"] = field(default="eigen", repr=False, kw_only=True)

    @model_validator(mode="after")
    def _steps_what_stands_still(self) -> Eigen:
        if self.train_auxiliary and "gradient" in (self.short, self.long):
            raise ValueError("train_auxiliary needs bases that do not follow gradients: short and long 'calibration'")
        return self

    @property
    def trains_all(self) -> bool:
        return self.train_auxiliary

    @property
    def calibrates(self) -> bool:
        return "calibration" in (self.short, self.long)

    def gauge_numbers(self, m: int, n: int) -> int:
        found = 0
        for side in ("rows", "columns"):
            blocks = self.blocks(side, m, n)
            if blocks is not None and not self.train_auxiliary:
                is_followed = self.source(side, m, n) == "gradient"
                found += blocks.number * blocks.size**2 * (2 if is_followed else 1)
        return found

    @property
    def moments(self) -> MomentRule:
        return MomentRule(self.block, self.refresh, self.growth, self.decay, self.second_moments)

    def unfollowed(self) -> dict[str, str]:
        return {side: "calibration" for side in ("short", "long") if getattr(self, side) == "gradient"}

    def source(self, side: Side, m: int, n: int) -> Source:
        return self.short if (side == "rows") == (m <= n) else self.long

    def blocks(self, side: Side, m: int, n: int) -> Blocks | None:
        if self.source(side, m, n) == "none":
            return None
        length = m if side == "rows" else n
        is_whole = (side == "rows") == (m <= n) and length <= WHOLE_SHORT_SIDE
        return Blocks.of(length, length if is_whole else self.block)

    def basis_core(self, side: Side, m: int, n: int) -> int | None:
        if self.blocks(side, m, n) is None:
            return None
        return 0 if side == "rows" else self.centre(m, n) + 1

    def core_shapes(self, m: int, n: int) -> tuple[tuple[int, int], ...]:
        rows, columns = self.blocks("rows", m, n), self.blocks("columns", m, n)
        left = () if rows is None else ((rows.number * rows.size, rows.size),)
        right = () if columns is None else ((columns.number * columns.size, columns.size),)
        return (*left, (m, n), *right)

    def centre(self, m: int, n: int) -> int:
        return 0 if self.blocks("rows", m, n) is None else 1

    def of_site(self, name: str) -> Eigen:
        """Return the same, without a basis on the axis of an embedding's tokens, which have no common directions."""
        return replace(self, long="none") if name.endswith(".lora_embedding_A") else self

    def trained(self, m: int, n: int) -> tuple[int, ...]:
        return super().trained(m, n) if self.train_auxiliary else (self.centre(m, n),)

    def shareable(self, m: int, n: int) -> tuple[int, ...]:
        k = self.basis_core("columns", m, n)
        is_measured = self.source("columns", m, n) == "calibration" and not self.train_auxiliary
        return (k,) if is_measured and k is not None else ()

    def init_one(self, matrix: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        m, n = matrix.shape
        centre = self.centre(m, n)
        shapes = enumerate(self.core_shapes(m, n))
        return tuple(
            matrix if k == centre else torch.eye(q, dtype=torch.float64).repeat(p // q, 1) for k, (p, q) in shapes
        )

    def contract(self, cores: Sequence[Tensor], m: int, n: int) -> Tensor:
        self.check(cores, m, n)
        return self._turned(cores, cores[self.centre(m, n)], m, n, inverse=True)

    def apply(self, cores: Sequence[Tensor], x: Tensor, m: int, n: int) -> Tensor:
        self.check(cores, m, n)
        rows, columns = (self._bases(cores, side, m, n) for side in ("rows", "columns"))
        turned = x if columns is None else turn(x, *columns, "columns")
        turned = turned @ cores[self.centre(m, n)].mT
        return turned if rows is None else turn(turned, *rows, "columns", inverse=True)

    def frames(self, cores: Sequence[Tensor], m: int, n: int) -> tuple[Tensor, Tensor]:
        """The blocks of U and of V^T: (G * count, size, size); (G, 1, 1) where a side keeps the identity."""
        one = cores[0].new_ones(len(cores[self.centre(m, n)]), 1, 1)
        rows, columns = (self._bases(cores, side, m, n) for side in ("rows", "columns"))
        return one if rows is None else rows[0].flatten(0, 1), one if columns is None else columns[0].flatten(0, 1).mT

    def to_centre(self, cores: Sequence[Tensor], matrices: Tensor, m: int, n: int, *, squared: bool = False) -> Tensor:
        used = [core.square() for core in cores] if squared else cores
        return self._turned(used, matrices, m, n, inverse=False)

    def started(self, cores: Sequence[Tensor], measured: Sequence[Bases], m: int, n: int) -> tuple[Tensor, ...]:
        turns: dict[Side, tuple[Tensor, Tensor]] = {}
        for side in ("rows", "columns"):
            blocks = self.blocks(side, m, n)
            if blocks is None or side not in measured[0]:
                continue
            each = [bases[side] for bases in measured]
            first = [i for i, basis in enumerate(each) if i == 0 or not torch.equal(basis, each[i - 1])]
            share = len(each) // len(first)
            is_even = self.basis_core(side, m, n) in self.shareable(m, n) and first == list(range(0, len(each), share))
            basis = torch.stack([each[i] for i in first] if is_even else each)
            turns[side] = basis, basis
        return self.turned(cores, turns, m, n)

    def turned(
        self, cores: Sequence[Tensor], turns: Mapping[Side, tuple[Tensor, Tensor]], m: int, n: int
    ) -> tuple[Tensor, ...]:
        result = list(cores)
        centre = cores[self.centre(m, n)]
        for side, (basis, change) in turns.items():
            k, blocks = self.basis_core(side, m, n), self.blocks(side, m, n)
            assert k is not None
            assert blocks is not None
            result[k] = basis.flatten(1, 2)
            centre = turn(centre, change, blocks, side)
        result[self.centre(m, n)] = centre
        return tuple(result)

    def departure(self, cores: Sequence[Tensor], m: int, n: int) -> float:
        found = [0.0]
        for side in ("rows", "columns"):
            bases = self._bases(cores, side, m, n)
            if bases is None:
                continue
            basis, blocks = bases
            identity = torch.eye(blocks.size, dtype=basis.dtype, device=basis.device)
            clean = torch.where(blocks.padding(basis.device), identity, basis)
            found += [float((basis - clean).abs().max()), float((clean.mT @ clean - identity).abs().max())]
        return max(found)

    def contraction_terms(self, m: int, n: int) -> int:
        sides = [self.blocks("rows", m, n), self.blocks("columns", m, n)]
        return sum(blocks.size for blocks in sides if blocks is not None) + 2

    def _turned(self, cores: Sequence[Tensor], matrices: Tensor, m: int, n: int, *, inverse: bool) -> Tensor:
        """U^T M V of matrices; with `inverse`, U M V^T."""
        for side in ("rows", "columns"):
            found = self._bases(cores, side, m, n)
            if found is not None:
                matrices = turn(matrices, *found, side, inverse=inverse)
        return matrices

    def _bases(self, cores: Sequence[Tensor], side: Side, m: int, n: int) -> tuple[Tensor, Blocks] | None:
        """A side's basis, (H, count, size, size), and its blocks; None where it keeps the identity."""
        k, blocks = self.basis_core(side, m, n), self.blocks(side, m, n)
        if k is None or blocks is None:
            return None
        return cores[k].reshape(len(cores[k]), blocks.number, blocks.size, blocks.size), blocks
