"""Training in the eigenbases of second moments, one matrix at a time and in the matrix's own axes.

No centre core exists here: what the product keeps in rotated axes (the matrix, the first moment) is kept as it is, and
each step is turned into the bases and back. Signs of eigenvectors are left as LAPACK gives them, since Adam's step does
not depend on them. Only where the bases are stepped too are there three factors, each dense and with a mask.

Source: Vyas et al. 2024 (SOAP), arXiv:2409.11321, algorithms 3 and 4; Loshchilov and Hutter 2019 (AdamW),
arXiv:1711.05101, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

from oracles.contraction import Array

RIDGE = 1e-7
"""Share of a moment's mean eigenvalue that is added to it."""


@dataclass(frozen=True)
class Rule:
    """How bases follow gradients, and AdamW's constants.

    Args:
        short: Whether the shorter side (the rows of a square matrix) has a basis.
        long: Whether the longer side has one.
        block: Largest block of the longer side, and of a shorter one above `whole`.
        whole: Largest shorter side that is one block.
        refresh: Steps until the first refresh.
        growth: Factor from one refresh to the next; 1: every `refresh` steps; None: each basis once.
        decay: Share of the running moments that stays.
        carried: Whether later refreshes carry second moments by squares, rather than keep them with their directions.
        ratio: B's rate as a multiple of A's.
    """

    short: bool = True
    long: bool = True
    block: int = 64
    whole: int = 256
    refresh: int = 1
    growth: float | None = 1.5
    decay: float = 0.95
    carried: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    ratio: float = 1.0

    def rate(self, name: str, rate: float) -> float:
        """The rate of a matrix where A has `rate`."""
        return rate * (self.ratio if name.endswith("lora_B") else 1)


@dataclass
class Basis:
    """One side's blocks: their running moments and eigenvectors; started once the latter have been computed.

    A basis that was measured before the run has no moments, and stays as it is.
    """

    blocks: list[Array]
    vectors: list[Array]
    started: bool = False

    @classmethod
    def identity(cls, length: int, largest: int) -> Basis:
        sizes = [len(part) for part in np.array_split(np.arange(length), ceil(length / largest))]
        return cls([np.zeros((size, size)) for size in sizes], [np.eye(size) for size in sizes])

    @property
    def is_measured(self) -> bool:
        return not self.blocks

    def dense(self) -> Array:
        return _diagonal(self.vectors)


@dataclass
class Matrix:
    """One matrix, its moments in Adam and its bases; a side without a basis has none."""

    value: Array
    rows: Basis | None
    columns: Basis | None
    first: Array
    second: Array
    seen: int = 0

    def dense(self) -> tuple[Array, Array]:
        m, n = self.value.shape
        u = np.eye(m) if self.rows is None else self.rows.dense()
        return u, np.eye(n) if self.columns is None else self.columns.dense()


@dataclass
class EigenAdamW:
    """The whole update of several matrices, which share one norm of their gradients.

    Attributes:
        smallest_gap: Least distance of two neighbouring eigenvalues that ordered or separated directions, relative to
            the largest: what rounding errors of a moment are multiplied by the inverse of.
    """

    rule: Rule
    matrices: dict[str, Matrix]
    steps: int = 0
    due: int = 0
    smallest_gap: float = 1.0
    refreshes: list[int] = field(default_factory=list)

    @classmethod
    def of(
        cls, matrices: Mapping[str, Array], rule: Rule, measured: Mapping[str, Mapping[str, list[Array]]] | None = None
    ) -> EigenAdamW:
        """Matrices in identity bases, or in those that were measured, block by block: `rows` and `columns` by name."""
        made = {}
        for name, value in matrices.items():
            m, n = value.shape
            has_rows, has_columns = (rule.short, rule.long) if m <= n else (rule.long, rule.short)
            rows = Basis.identity(m, m if m <= min(n, rule.whole) else rule.block) if has_rows else None
            columns = Basis.identity(n, n if n < m and n <= rule.whole else rule.block) if has_columns else None
            for side, blocks in (measured or {}).get(name, {}).items():
                basis = Basis([], blocks, started=True)
                rows, columns = (basis, columns) if side == "rows" else (rows, basis)
            made[name] = Matrix(value.copy(), rows, columns, np.zeros_like(value), np.zeros_like(value))
        return cls(rule, made, due=rule.refresh)

    def step(self, gradients: Mapping[str, Array], rate: float) -> None:
        """One optimizer step, and what follows it."""
        self.steps += 1
        norm = np.sqrt(sum(np.sum(gradient**2) for gradient in gradients.values()))
        for name, matrix in self.matrices.items():
            if np.isfinite(norm) and norm > 0:
                self._observe(matrix, gradients[name] / norm)
            self._adamw(matrix, gradients[name], self.rule.rate(name, rate))
        if self.steps >= self.due:
            self.refreshes.append(self.steps)
            for matrix in self.matrices.values():
                self._refresh(matrix)
            if self.rule.growth is None:
                self.due = 2 * self.steps
            elif self.rule.growth == 1:
                self.due = self.steps + self.rule.refresh
            else:
                self.due = max(self.steps + 1, ceil(self.rule.growth * self.steps))

    def _observe(self, matrix: Matrix, gradient: Array) -> None:
        if not gradient.any():
            return
        matrix.seen += 1
        for basis, along in ((matrix.rows, gradient), (matrix.columns, gradient.T)):
            if basis is not None and not basis.is_measured:
                parts = np.split(along, np.cumsum([len(block) for block in basis.blocks])[:-1])
                for block, part in zip(basis.blocks, parts, strict=True):
                    block[:] = self.rule.decay * block + (1 - self.rule.decay) * part @ part.T

    def _adamw(self, matrix: Matrix, gradient: Array, rate: float) -> None:
        """Algorithm 3, lines 3 to 11, with Adam's bias corrections and decoupled weight decay."""
        (beta1, beta2), t = self.rule.betas, self.steps
        u, v = matrix.dense()
        matrix.first = beta1 * matrix.first + (1 - beta1) * gradient
        matrix.second = beta2 * matrix.second + (1 - beta2) * (u.T @ gradient @ v) ** 2
        scale = np.sqrt(matrix.second / (1 - beta2**t)) + self.rule.eps
        step = u @ ((u.T @ matrix.first @ v) / (1 - beta1**t) / scale) @ v.T
        matrix.value = (1 - rate * self.rule.weight_decay) * matrix.value - rate * step

    def _refresh(self, matrix: Matrix) -> None:
        m, n = matrix.value.shape
        if matrix.rows is not None and not matrix.rows.is_measured:
            matrix.second = (matrix.second.T @ self._turned(matrix, matrix.rows, n)).T
        if matrix.columns is not None and not matrix.columns.is_measured:
            matrix.second = matrix.second @ self._turned(matrix, matrix.columns, m)

    def _turned(self, matrix: Matrix, basis: Basis, other: int) -> Array:
        """Renew a basis, and return what the squared gradients are multiplied by."""
        largest = max(len(block) for block in basis.blocks)
        if matrix.seen < ceil(largest / other) or (basis.started and self.rule.growth is None):
            return np.eye(sum(len(block) for block in basis.blocks))
        carriers = []
        for k, (moment, old) in enumerate(zip(basis.blocks, basis.vectors, strict=True)):
            # A shorter block is kept with a row and column of padding, which counts in its mean.
            settled = moment + RIDGE * np.trace(moment) / largest * np.eye(len(moment))
            if basis.started:
                new, order, estimates = qr_iteration(settled, old)
                kept = np.eye(len(old))[:, order]
                carriers.append((old.T @ new) ** 2 if self.rule.carried else kept)
            else:
                estimates, ascending = np.linalg.eigh(settled)
                new, estimates = ascending[:, ::-1], estimates[::-1]
                carriers.append((old.T @ new) ** 2)
            if len(estimates) > 1:
                self.smallest_gap = min(self.smallest_gap, float(np.min(-np.diff(estimates)) / estimates[0]))
            basis.vectors[k] = new
        basis.started = True
        return _diagonal(carriers)


class SteppedFactors:
    """A matrix U Z V^T of which AdamW steps all three factors, the bases at a rate of their own and without decay.

    Args:
        value: The matrix M, (m, n).
        rows: Blocks of U.
        columns: Blocks of V.
    """

    def __init__(self, value: Array, rows: list[Array], columns: list[Array]) -> None:
        u, v = _diagonal(rows), _diagonal(columns)
        self.factors = [u, u.T @ value @ v, v]
        inside = [_diagonal([np.ones_like(block) for block in blocks]) for blocks in (rows, columns)]
        self._masks = [inside[0], np.ones_like(value), inside[1]]
        self._first = [np.zeros_like(factor) for factor in self.factors]
        self._second = [np.zeros_like(factor) for factor in self.factors]
        self._steps = 0

    @property
    def value(self) -> Array:
        u, z, v = self.factors
        return u @ z @ v.T

    def step(self, gradient: Array, rate: float, aux_scale: float, rule: Rule) -> None:
        """One step, with dL/dM; the bases have `aux_scale` times the rate."""
        (u, z, v), (beta1, beta2) = self.factors, rule.betas
        self._steps += 1
        each = [gradient @ v @ z.T, u.T @ gradient @ v, gradient.T @ u @ z]
        for k, scale in enumerate((aux_scale, 1.0, aux_scale)):
            g = each[k] * self._masks[k]
            self._first[k] = beta1 * self._first[k] + (1 - beta1) * g
            self._second[k] = beta2 * self._second[k] + (1 - beta2) * g**2
            mean, square = self._first[k] / (1 - beta1**self._steps), self._second[k] / (1 - beta2**self._steps)
            kept = 1 - rate * rule.weight_decay if k == 1 else 1
            self.factors[k] = kept * self.factors[k] - scale * rate * mean / (np.sqrt(square) + rule.eps)


def qr_iteration(
    moment: Array, vectors: Array, *, ordered: bool = True
) -> tuple[Array, npt.NDArray[np.integer[Any]], Array]:
    """Algorithm 4: next eigenvectors, the order that the present ones were put in first, and their eigenvalues.

    The paper's listing does not order them; its authors' implementation does (`get_orthogonal_matrix_QR`).
    """
    estimates = np.diag(vectors.T @ moment @ vectors)
    order = np.argsort(-estimates, kind="stable") if ordered else np.arange(len(estimates))
    return np.linalg.qr(moment @ vectors[:, order])[0], order, estimates[order]


def soap(
    weight: Array,
    gradients: Sequence[Array],
    *,
    rate: float,
    betas: tuple[float, float],
    frequency: int,
    ordered: bool,
) -> Iterable[Array]:
    """Algorithm 3 line by line: W after each step.

    What the paper leaves open ("for simplicity we ignore the initialization and other boundary effects"): Q_L and Q_R
    begin as identities, become eigenvectors after the first step, with V's squares turned along, and bias corrections
    are Adam's. epsilon is 0.
    """
    (beta1, beta2), (m, n) = betas, weight.shape
    left, right, q_left, q_right = np.zeros((m, m)), np.zeros((n, n)), np.eye(m), np.eye(n)
    mean, square = np.zeros((m, n)), np.zeros((m, n))
    for t, g in enumerate(gradients, 1):
        g_turned = q_left.T @ g @ q_right
        mean = beta1 * mean + (1 - beta1) * g
        mean_turned = q_left.T @ mean @ q_right
        square = beta2 * square + (1 - beta2) * g_turned * g_turned
        step_turned = mean_turned / (1 - beta1**t) / np.sqrt(square / (1 - beta2**t))
        weight = weight - rate * q_left @ step_turned @ q_right.T
        left = beta2 * left + (1 - beta2) * g @ g.T
        right = beta2 * right + (1 - beta2) * g.T @ g
        if t == 1:
            q_left, q_right = (np.linalg.eigh(moment)[1][:, ::-1] for moment in (left, right))
            square = (q_left**2).T @ square @ q_right**2
        elif t % frequency == 0:
            q_left, rows, _ = qr_iteration(left, q_left, ordered=ordered)
            q_right, columns, _ = qr_iteration(right, q_right, ordered=ordered)
            square = square[rows][:, columns]
        yield weight


def _diagonal(blocks: Sequence[Array]) -> Array:
    """A block-diagonal matrix."""
    length, at = sum(len(block) for block in blocks), 0
    dense = np.zeros((length, length))
    for block in blocks:
        dense[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return dense
