"""A matrix in the eigenbases of second moments: the gauge that an optimizer with a diagonal scaling profits from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal, final

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from loraover.common.later import torch
from loraover.overparam.block_bases import MAX_BLOCK, SIDES, Blocks, MomentRule, Side, SideBases, Source, turn
from loraover.overparam.decompositions.base import Decomposition

if TYPE_CHECKING:
    from torch import Tensor

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
            raise ValueError(
                "train_auxiliary needs bases that do not follow gradients: set short and long to 'calibration'"
            )
        return self

    @cached_property
    def bases(self) -> EigenBases:
        return EigenBases(self)

    def core_shapes(self, m: int, n: int) -> tuple[tuple[int, int], ...]:
        rows, columns = (self.bases.blocks(side, m, n) for side in SIDES)
        left = () if rows is None else ((rows.number * rows.size, rows.size),)
        right = () if columns is None else ((columns.number * columns.size, columns.size),)
        return (*left, (m, n), *right)

    def centre(self, m: int, n: int) -> int:
        return self.bases.centre(m, n)

    def of_site(self, name: str) -> Eigen:
        """Return this decomposition without a basis of an embedding's tokens, which have no common directions."""
        return replace(self, long="none") if name.endswith(".lora_embedding_A") else self

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
        rows, columns = (self.bases.of(cores, side, m, n) for side in SIDES)
        turned = x if columns is None else turn(x, *columns, "columns")
        turned = turned @ cores[self.centre(m, n)].mT
        return turned if rows is None else turn(turned, *rows, "columns", inverse=True)

    def frames(self, cores: Sequence[Tensor], m: int, n: int) -> tuple[Tensor, Tensor]:
        """The blocks of U and of V^T: (G * count, size, size); (G, 1, 1) where a side keeps the identity."""
        one = cores[0].new_ones(len(cores[self.centre(m, n)]), 1, 1)
        rows, columns = (self.bases.of(cores, side, m, n) for side in SIDES)
        return one if rows is None else rows[0].flatten(0, 1), one if columns is None else columns[0].flatten(0, 1).mT

    def to_centre(self, cores: Sequence[Tensor], matrices: Tensor, m: int, n: int, *, squared: bool = False) -> Tensor:
        used = [core.square() for core in cores] if squared else cores
        return self._turned(used, matrices, m, n, inverse=False)

    def contraction_terms(self, m: int, n: int) -> int:
        sides = [self.bases.blocks(side, m, n) for side in SIDES]
        return sum(blocks.size for blocks in sides if blocks is not None) + 2

    def _turned(self, cores: Sequence[Tensor], matrices: Tensor, m: int, n: int, *, inverse: bool) -> Tensor:
        """U^T M V of matrices; with `inverse`, U M V^T."""
        for side in SIDES:
            found = self.bases.of(cores, side, m, n)
            if found is not None:
                matrices = turn(matrices, *found, side, inverse=inverse)
        return matrices


@final
class EigenBases(SideBases):
    """U and V of an `Eigen`, the first and the last of its cores where they are not the identity."""

    def __init__(self, options: Eigen) -> None:
        self._options = options

    @property
    def rule(self) -> MomentRule:
        own = self._options
        return MomentRule(own.block, own.refresh, own.growth, own.decay, own.second_moments)

    @property
    def are_stepped(self) -> bool:
        return self._options.train_auxiliary

    @property
    def calibrates(self) -> bool:
        return "calibration" in (self._options.short, self._options.long)

    def unfollowed(self) -> dict[str, str]:
        return {side: "calibration" for side in ("short", "long") if getattr(self._options, side) == "gradient"}

    def source(self, side: Side, m: int, n: int) -> Source:
        return self._options.short if (side == "rows") == (m <= n) else self._options.long

    def blocks(self, side: Side, m: int, n: int) -> Blocks | None:
        if self.source(side, m, n) == "none":
            return None
        length = m if side == "rows" else n
        is_whole = (side == "rows") == (m <= n) and length <= WHOLE_SHORT_SIDE
        return Blocks.of(length, length if is_whole else self._options.block)

    def core(self, side: Side, m: int, n: int) -> int | None:
        if self.blocks(side, m, n) is None:
            return None
        return 0 if side == "rows" else self.centre(m, n) + 1

    def centre(self, m: int, n: int) -> int:
        return 0 if self.blocks("rows", m, n) is None else 1
