"""Product of plain matrices, wider inside than outside: a deep linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from math import ceil
from typing import TYPE_CHECKING, Annotated, Literal, final

from pydantic import Field
from pydantic.dataclasses import dataclass

from loraover.overparam.decompositions.base import MAX_CORES, Decomposition, Ratio, random_coisometry

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@final
@dataclass(frozen=True)
class Chain(Decomposition):
    """M = U_1 U_2 ... U_{depth-1} C for m <= n, and its mirror image for m > n.

    The auxiliary U_k stand on the shorter side s = min(m, n): U_1 is s x w, the others w x w, and the
    centre C is w x max(m, n), with width w = ceil(expansion * s). The U_k contract to P with
    P P^T = I, and C = P^T M.

    Args:
        depth: Number of matrices, at least 2.
        expansion: Ratio of the inner width to the shorter side, at least 1. The number of parameters grows by about
            this factor.

    Source:
        Arora et al. 2018, arXiv:1802.06509; Guo et al. 2020 (ExpandNets), arXiv:1811.10495.
    """

    depth: Annotated[int, Field(strict=True, ge=2, le=MAX_CORES)] = 2
    expansion: Ratio = 2.0
    name: Literal["chain"] = field(default="chain", repr=False, kw_only=True)

    def core_shapes(self, m: int, n: int) -> tuple[tuple[int, int], ...]:
        short, long = min(m, n), max(m, n)
        width = ceil(self.expansion * short)
        shapes = ((short, width), *((width, width),) * (self.depth - 2), (width, long))
        return shapes if m <= n else tuple((q, p) for p, q in reversed(shapes))

    def centre(self, m: int, n: int) -> int:
        return self.depth - 1 if m <= n else 0

    def init_one(self, matrix: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        m, n = matrix.shape
        if m > n:
            return tuple(core.mT for core in reversed(self.init_one(matrix.mT, generator)))
        centre, cores = matrix, []
        for rows, columns in self.core_shapes(m, n)[:-1]:
            cores.append(random_coisometry(generator, rows, columns))
            centre = cores[-1].mT @ centre
        return (*cores, centre)

    def contract(self, cores: Sequence[Tensor], m: int, n: int) -> Tensor:
        self.check(cores, m, n)
        product = self._auxiliary(cores, m, n)
        return product @ cores[-1] if m <= n else cores[0] @ product

    def apply(self, cores: Sequence[Tensor], x: Tensor, m: int, n: int) -> Tensor:
        self.check(cores, m, n)
        for core in reversed(cores):
            x = x @ core.mT
        return x

    def frames(self, cores: Sequence[Tensor], m: int, n: int) -> tuple[Tensor, Tensor]:
        one = cores[0].new_ones(len(cores[0]), 1, 1)
        product = self._auxiliary(cores, m, n)
        return (product, one) if m <= n else (one, product)

    def _auxiliary(self, cores: Sequence[Tensor], m: int, n: int) -> Tensor:
        """Contract all cores but the centre."""
        product, *rest = cores[:-1] if m <= n else reversed(cores[1:])
        for core in rest:
            product = product @ core if m <= n else core @ product
        return product

    def to_centre(self, cores: Sequence[Tensor], matrices: Tensor, m: int, n: int, *, squared: bool = False) -> Tensor:
        left, right = (frame.square() if squared else frame for frame in self.frames(cores, m, n))
        return left.mT @ matrices if m <= n else matrices @ right.mT

    def contraction_terms(self, m: int, n: int) -> int:
        return (self.depth - 1) * ceil(self.expansion * min(m, n))
