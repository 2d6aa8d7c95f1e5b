"""Algebra of delta_W = B @ A on its factors, in float64: no matrix of (out_features, in_features) is ever formed.

    B = Q_b R_b, A^T = Q_a R_a          two thin QR factorisations
    R_b R_a^T = U diag(s) V^T           the SVD of a small square matrix, the core
    B A = (Q_b U) diag(s) (Q_a V)^T     the SVD of delta_W

The first R singular values give the best approximation of rank R, in the Frobenius and the spectral norm, and the root
of the sum of the squares of the others is its error (Eckart and Young 1936, doi:10.1007/BF02288367).

Bounds are measured, so they hold whatever LAPACK computed: from the residuals of the three factorisations, and from how
far Q^T Q is from the identity. `dense_svd` is for deltas that are not given by factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraover.adapters.numerics.delta import Delta
from loraover.checkpoint.error_bounds import U64, gamma
from loraover.checkpoint.exact_tensors import Exact
from loraover.common.errors import FoldError
from loraover.common.later import torch

if TYPE_CHECKING:
    from torch import Tensor

OF_NORMS = 1.01
"""Factor by which bounds are enlarged, since the norms in them are rounded too."""


@dataclass(frozen=True)
class Truncation:
    """The best approximation of a matrix by factors of a given rank.

    Args:
        b: Left factor, (out_features, rank), in float64; both factors have the root of the singular values.
        a: Right factor, (rank, in_features), in float64.
        singular_values: All singular values of the matrix, the largest first.
        error: Frobenius norm of the matrix minus b @ a: the root of the sum of squares of the other singular values.
        bound: Largest difference between `error` and the Frobenius norm of the exact matrix minus the exact product of
            the two factors, and between `error` and the smallest possible error at that rank.
    """

    b: Tensor
    a: Tensor
    singular_values: Tensor
    error: float
    bound: float

    def delta(self, module: str, embedding: bool) -> Delta:
        """Return the factors as the delta of a module."""
        return Delta.of_factors(module, embedding, self.b, self.a)


@dataclass(frozen=True)
class SingularValues:
    """Singular value decomposition (Q_b U) diag(s) (Q_a V)^T of a matrix.

    Args:
        left: Orthonormal columns Q_b, (out_features, p); None stands for the identity.
        u: Left singular vectors of the core, (p, k).
        s: Singular values, (k,), the largest first.
        v: Right singular vectors of the core, (q, k).
        right: Orthonormal columns Q_a, (in_features, q); None stands for the identity.
        residual: Bound of the Frobenius norm of the matrix minus the decomposition.
        departure: Bound of the relative error of singular values that the departure of the four factors from
            orthogonality causes.
    """

    left: Tensor | None
    u: Tensor
    s: Tensor
    v: Tensor
    right: Tensor | None
    residual: float
    departure: float

    @property
    def norm(self) -> float:
        """Frobenius norm of the matrix."""
        return float(self.s.norm())

    def error(self, rank: int) -> float:
        """Return the Frobenius norm of what the best approximation of a rank leaves out."""
        return float(self.s[rank:].norm())

    def noise(self, rank: int) -> float:
        """Return the bound of the difference between `error(rank)` and the exact matrix's smallest error."""
        return self._noise_of(self.error(rank))

    def _noise_of(self, error: float) -> float:
        return OF_NORMS * (self.residual + (self.departure + gamma(len(self.s) + 2, U64)) * error)

    def numerical_rank(self, noise: float = 0.0) -> int:
        """Return the smallest rank whose error cannot be told from rounding; 0 if all of the matrix is rounding."""
        tails = self.s.flip(0).square().cumsum(0).sqrt().flip(0)  # error of the ranks 0, 1, ...
        return sum(float(tail) > self._noise_of(float(tail)) + noise for tail in tails)

    def columns(self, rank: int) -> Tensor:
        """Return the first left singular vectors, (out_features, rank)."""
        return _times(self.left, self.u[:, :rank])

    def rows(self, rank: int) -> Tensor:
        """Return the first right singular vectors, (in_features, rank)."""
        return _times(self.right, self.v[:, :rank])

    def truncate(self, rank: int) -> Truncation:
        """Return the best approximation of a rank, or all factors if there are fewer singular values."""
        root = self.s[:rank].sqrt()
        b, a = _times(self.left, self.u[:, :rank] * root), _times(self.right, self.v[:, :rank] * root).mT.contiguous()
        # |fl(Q X) - Q X| <= gamma_(p + 2) |Q| |X|, and ||Q||_F <= root of p, ||X||_F = the root of the sum of s
        terms = max(len(self.u), len(self.v)) + 2
        product = 2 * gamma(terms, U64) * math.sqrt(terms) * float(root.norm()) * float(root.max()) if rank else 0.0
        bound = self.noise(rank) + OF_NORMS * (1 + self.departure) * product
        return Truncation(b, a, self.s, self.error(rank), bound)


def decompose(b: Tensor, a: Tensor) -> SingularValues:
    """Decompose B @ A from its factors, (m, r) and (r, n) in float64.

    It takes some 6 (m + n) r^2 multiplications, where a dense SVD takes some 14 m n min(m, n).
    """
    _check_range(float(b.norm()) * float(a.norm()))
    # Each column of B and its row of A get norms of one size, by powers of two, which keep the product exactly.
    # Rounding is then relative to the sum of the norms of its r terms, even if one factor of a term is tiny.
    columns, rows = b.norm(dim=0), a.norm(dim=1)
    used = (columns > 0) & (rows > 0)
    ratio = torch.where(used, rows / columns, 1.0)
    power = torch.ldexp(used.to(b.dtype), (ratio.log2() / 2).round())
    b, a = b * power, a * torch.where(used, 1 / power, 0.0)[:, None]
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.mT)
    core = upper @ lower.mT
    u, s, vt = torch.linalg.svd(core, full_matrices=False)
    off_b, off_a = _residual(b, left, upper), _residual(a.mT, right, lower)
    of_core = gamma(len(lower.mT), U64) * float(upper.norm()) * float(lower.norm())
    off_core = of_core + _residual(core, u * s, vt)
    departure = sum(map(_departure, (left, u, vt.mT, right)))
    size_b, size_a = float(b.norm()), float(a.norm())
    residual = off_b * size_a + (1 + departure) * (size_b * off_a + off_core)
    return SingularValues(left, u, s, vt.mT, right, OF_NORMS * residual, departure)


def dense_svd(matrix: Tensor) -> SingularValues:
    """Decompose a matrix (m, n) in float64 that is not given by factors.

    It takes some 14 m n min(m, n) multiplications and the memory of four copies of the matrix: seconds for 1024 x 4096,
    and minutes for 4096 x 14336, for each module.
    """
    _check_range(float(matrix.norm()))
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    departure = _departure(u) + _departure(vt.mT)
    return SingularValues(None, u, s, vt.mT, None, OF_NORMS * _residual(matrix, u * s, vt), departure)


def concatenate(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the factors of the sum of several products B_i @ A_i: [B_1, B_2, ...] and [A_1; A_2; ...]."""
    return torch.cat([b for b, _ in factors], dim=1), torch.cat([a for _, a in factors])


def singular_values(b: Tensor, a: Tensor) -> Tensor:
    """Return the singular values of B @ A, the largest first; about a quarter of the work of `decompose`."""
    upper, lower = (torch.linalg.qr(x, mode="r").R for x in (b, a.mT))
    values: Tensor = torch.linalg.svdvals(upper @ lower.mT)
    return values


def rank_of_energy(spectrum: Tensor, share: float) -> int:
    """Return the smallest rank, at least 1, that keeps a share of the sum of squares of singular values."""
    squares = spectrum.square()
    tails = squares.flip(0).cumsum(0).flip(0)  # what the ranks 0, 1, ... leave out
    return max(1, int((tails > (1 - share) * squares.sum()).sum()))


def factor_noise(b: Exact, a: Exact) -> float:
    """Return a bound of the Frobenius norm of the error of B @ A that the errors of its factors cause.

    It is the sum over the r terms of |db| (|a| + |da|) + |b| |da|, where each stands for the norm of a column or row.
    """
    (columns, off_b), (rows, off_a) = (
        [part.double().norm(dim=dim) for part in (x.value, x.bound)] for x, dim in ((b, 0), (a, 1))
    )
    return OF_NORMS * float((off_b * (rows + off_a) + columns * off_a).sum())


def product_norm(b: Tensor, a: Tensor) -> float:
    """Return the Frobenius norm of B @ A, from its factors."""
    if 0 in (*b.shape, *a.shape):
        return 0.0
    return float((torch.linalg.qr(b, mode="r").R @ a).norm())


def sum_norm(factors: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the Frobenius norm of a sum of products B_i @ A_i that do not cancel, from r x r matrices only.

    Its relative error is some u64 times the ratio of the sum of their squared norms to the squared norm of the sum.
    """
    squares = sum(float(((b.mT @ d) * (a @ c.mT)).sum()) for b, a in factors for d, c in factors)
    return math.sqrt(max(0.0, squares))


def principal_angles(one: Tensor, other: Tensor) -> list[float]:
    """Return the min(p, q) principal angles between the spaces of orthonormal columns, the smallest first.

    Small angles come from their sines and large ones from their cosines, so that none loses digits (Björck and Golub
    1973, doi:10.1090/S0025-5718-1973-0348991-3).
    """
    wide, narrow = (one, other) if one.shape[1] >= other.shape[1] else (other, one)
    if narrow.shape[1] == 0:
        return []
    inner = wide.mT @ narrow
    cosines = torch.linalg.svdvals(inner).clamp_max(1)
    sines = torch.linalg.svdvals(narrow - wide @ inner).flip(0).clamp_max(1)
    angles: list[float] = torch.where(cosines > sines, sines.asin(), cosines.acos()).tolist()
    return angles


def _check_range(size: float) -> None:
    if not math.isfinite(size * size):
        raise FoldError("delta_W is beyond the range of float64; lower the weights of the sum, or the adapter's alpha.")


def _times(basis: Tensor | None, inner: Tensor) -> Tensor:
    return inner if basis is None else basis @ inner


def _residual(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    """Bound of the Frobenius norm of a matrix minus left @ right."""
    found = torch.addmm(matrix, left, right, alpha=-1)
    return float(found.norm()) + gamma(len(right) + 2, U64) * (float(left.norm()) * float(right.norm()))


def _departure(q: Tensor) -> float:
    """Bound of the Frobenius norm of Q^T Q minus the identity; sums of some rows each keep its rounding small."""
    m, p = q.shape
    at_once = math.isqrt(m) + 1
    blocks = torch.split(q, at_once)
    gram = sum((block.mT @ block for block in blocks[1:]), blocks[0].mT @ blocks[0])
    gram.diagonal().sub_(1)
    return OF_NORMS * (float(gram.norm()) + 2 * p * gamma(at_once + len(blocks) + 1, U64))
