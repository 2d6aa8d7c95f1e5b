"""Singular value decomposition whose three factors are all trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Literal, final

from pydantic.dataclasses import dataclass

from loraover.common.later import torch
from loraover.overparam.decompositions.base import Decomposition, random_coisometry

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True)
class Svd(Decomposition):
    """M = U diag(s) V, with k = min(m, n), U (m, k), s (1, k), V (k, n).

    The centre core is s. A zero matrix gets s = 0 between a random U with orthonormal columns and a random V with
    orthonormal rows: until s has grown, only the k directions u_i v_i move.

    Source:
        Golub and Van Loan 2013, Matrix Computations, 2.4.
    """

    name: Literal["svd"] = field(default="svd", repr=False, kw_only=True)

    def core_shapes(self, m: int, n: int) -> tuple[tuple[int, int], ...]:
        k = min(m, n)
        return (m, k), (1, k), (k, n)

    def centre(self, m: int, n: int) -> int:
        return 1

    def init_one(self, matrix: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        m, n = matrix.shape
        k = min(m, n)
        left, right = random_coisometry(generator, k, m).mT, random_coisometry(generator, k, n)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        is_zero = not bool(s.any())
        return left if is_zero else u, s.unsqueeze(0), right if is_zero else v

    def contract(self, cores: Sequence[Tensor], m: int, n: int) -> Tensor:
        self.check(cores, m, n)
        u, s, v = cores
        return (u * s) @ v

    def apply(self, cores: Sequence[Tensor], x: Tensor, m: int, n: int) -> Tensor:
        self.check(cores, m, n)
        u, s, v = cores
        return ((x @ v.mT) * s) @ u.mT

    def frames(self, cores: Sequence[Tensor], m: int, n: int) -> tuple[Tensor, Tensor]:
        return cores[0], cores[2]

    def to_centre(self, cores: Sequence[Tensor], matrices: Tensor, m: int, n: int, *, squared: bool = False) -> Tensor:
        left, right = (frame.square() if squared else frame for frame in self.frames(cores, m, n))
        return torch.einsum("gmk,gmn,gkn->gk", left, matrices, right).unsqueeze(1)

    def contraction_terms(self, m: int, n: int) -> int:
        return min(m, n) + 2
