"""Orthogonal bases of a matrix's sides, block by block: how they are kept, applied and computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from loraover.common.later import torch
from loraover.common.threads import one_thread

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["rows", "columns"]
SIDES: tuple[Side, Side] = ("rows", "columns")

Source = Literal["gradient", "calibration", "none"]
"""Where a basis comes from: gradients of the run, batches before it, or none, which is the identity."""

Bases: TypeAlias = "dict[Side, Tensor]"
"""Measured bases of a site's sides, (count, size, size); the very same tensor where several sites share one."""

MAX_BLOCK = 4096
"""Largest length of a block."""

RIDGE = 1e-7
"""Share of a moment's mean eigenvalue that is added to all of them, so that directions without a gradient stay put."""


class Blocks(NamedTuple):
    """How a side is divided: `number` blocks, the first `full` of them of length `size`, the others one shorter.

    A shorter block is kept with one row and column of padding, which is a separate direction, always the last.
    """

    number: int
    size: int
    full: int

    @classmethod
    def of(cls, length: int, largest: int) -> Blocks:
        """Divide a length into as few blocks of nearly equal length as possible."""
        count = ceil(length / largest)
        size = ceil(length / count)
        return cls(count, size, length - count * (size - 1))

    @property
    def length(self) -> int:
        """Length of the side."""
        return self.number * (self.size - 1) + self.full

    @property
    def triangle(self) -> int:
        """Numbers in the upper triangle of a block."""
        return self.size * (self.size + 1) // 2

    def split(self, x: Tensor) -> Tensor:
        """(..., length) to (..., count, size); shorter blocks get a zero at their end."""
        if self.full == self.number:
            return x.reshape(*x.shape[:-1], self.number, self.size)
        end = self.full * self.size
        long = x[..., :end].reshape(*x.shape[:-1], self.full, self.size)
        short = x[..., end:].reshape(*x.shape[:-1], self.number - self.full, self.size - 1)
        library: Any = np if isinstance(x, np.ndarray) else torch
        padded = library.concatenate([short, library.zeros_like(short[..., :1])], -1)
        whole: Tensor = library.concatenate([long, padded], -2)
        return whole

    def join(self, x: Tensor) -> Tensor:
        """Undo `split`."""
        if self.full == self.number:
            return x.reshape(*x.shape[:-2], self.length)
        library: Any = np if isinstance(x, np.ndarray) else torch
        parts = x[..., : self.full, :], x[..., self.full :, : self.size - 1]
        whole: Tensor = library.concatenate(
            [part.reshape(*x.shape[:-2], part.shape[-2] * part.shape[-1]) for part in parts], -1
        )
        return whole

    def diagonal(self, matrix: Tensor) -> Tensor:
        """Diagonal blocks, (count, size, size), of a (length, length) matrix."""
        blocks = self.split(self.split(matrix).movedim(0, -1))  # (count, size of columns, count, size of rows)
        places = torch.arange(self.number, device=matrix.device)
        return blocks[places, :, places].mT

    def padding(self, device: torch.device) -> Tensor:
        """Where the blocks hold padding, (count, size, size), bool."""
        mask = torch.zeros(self.number, self.size, self.size, dtype=torch.bool, device=device)
        mask[self.full :, -1, :] = True
        mask[self.full :, :, -1] = True
        return mask


class MomentRule(NamedTuple):
    """Rule by which second moments are kept, and bases turned after them; see the decomposition that keeps them."""

    block: int
    refresh: int
    growth: float | None
    decay: float
    second_moments: Literal["kept", "carried"]

    def next_refresh(self, step: int) -> int:
        """The step of the refresh that follows one at `step`, if `growth` is not None."""
        assert self.growth is not None
        return step + self.refresh if self.growth == 1 else max(step + 1, ceil(step * self.growth))


class SideBases(ABC):
    """Auxiliary cores that are orthogonal, block-diagonal bases of a matrix's sides.

    It is the second port of a decomposition, which gives it as its `bases`. A basis is the identity, or measured on
    calibration batches before the first step, or kept at the eigenvectors of second moments of the run's gradients.
    """

    @property
    @abstractmethod
    def rule(self) -> MomentRule:
        """How the second moments are kept; their eigenvectors are the bases."""

    @property
    @abstractmethod
    def are_stepped(self) -> bool:
        """Whether the optimizer steps the bases too, which then do not stay orthogonal."""

    @property
    @abstractmethod
    def calibrates(self) -> bool:
        """Whether some basis is measured on calibration batches at injection."""

    @abstractmethod
    def unfollowed(self) -> dict[str, str]:
        """Return the options to change so that no basis follows gradients; empty: none does."""

    @abstractmethod
    def source(self, side: Side, m: int, n: int) -> Source:
        """Where the basis of a side of an m x n matrix comes from."""

    @abstractmethod
    def blocks(self, side: Side, m: int, n: int) -> Blocks | None:
        """How the basis of a side of an m x n matrix is divided; None where it is the identity."""

    @abstractmethod
    def core(self, side: Side, m: int, n: int) -> int | None:
        """Index of the core that is a side's basis; None where it is the identity."""

    @abstractmethod
    def centre(self, m: int, n: int) -> int:
        """Index of the core between the bases, which has the matrix's shape."""

    def numbers(self, m: int, n: int) -> tuple[int, int]:
        """Numbers kept for one m x n matrix that are not trained: in bases, and in the moments that they follow."""
        bases = moments = 0
        for side in SIDES:
            blocks = self.blocks(side, m, n)
            if blocks is not None and not self.are_stepped:
                bases += blocks.number * blocks.size**2
                moments += blocks.number * blocks.triangle * (self.source(side, m, n) == "gradient")
        return bases, moments

    def bytes(self, m: int, n: int) -> int:
        """Bytes of `numbers` beside cores of float32: moments are kept in bfloat16, see `BasisFollower`."""
        bases, moments = self.numbers(m, n)
        return 4 * bases + 2 * moments

    def shareable(self, m: int, n: int) -> tuple[int, ...]:
        """Indices of the cores that several matrices of one shape may share: a measured basis of columns."""
        k = self.core("columns", m, n)
        is_measured = self.source("columns", m, n) == "calibration" and not self.are_stepped
        return (k,) if is_measured and k is not None else ()

    def of(self, cores: Sequence[Tensor], side: Side, m: int, n: int) -> tuple[Tensor, Blocks] | None:
        """A side's basis, (H, count, size, size), and its blocks; None where it is the identity."""
        k, blocks = self.core(side, m, n), self.blocks(side, m, n)
        if k is None or blocks is None:
            return None
        return cores[k].reshape(len(cores[k]), blocks.number, blocks.size, blocks.size), blocks

    def started(self, cores: Sequence[Tensor], measured: Sequence[Bases], m: int, n: int) -> tuple[Tensor, ...]:
        """Cores in measured bases; a basis of columns that neighbours share is kept once."""
        turns: dict[Side, tuple[Tensor, Tensor]] = {}
        for side in SIDES:
            if self.blocks(side, m, n) is None or side not in measured[0]:
                continue
            each = [bases[side] for bases in measured]
            first = [i for i, basis in enumerate(each) if i == 0 or not torch.equal(basis, each[i - 1])]
            share = len(each) // len(first)
            is_even = self.core(side, m, n) in self.shareable(m, n) and first == list(range(0, len(each), share))
            basis = torch.stack([each[i] for i in first] if is_even else each)
            turns[side] = basis, basis
        return self.turned(cores, turns, m, n)

    def turned(
        self, cores: Sequence[Tensor], turns: Mapping[Side, tuple[Tensor, Tensor]], m: int, n: int
    ) -> tuple[Tensor, ...]:
        """Cores of the same matrices in other bases: `turns` has the new basis of a side, and the blocks old^T new."""
        result = list(cores)
        centre = cores[self.centre(m, n)]
        for side, (basis, change) in turns.items():
            k, blocks = self.core(side, m, n), self.blocks(side, m, n)
            assert k is not None
            assert blocks is not None
            result[k] = basis.flatten(1, 2)
            centre = turn(centre, change, blocks, side)
        result[self.centre(m, n)] = centre
        return tuple(result)

    def departure(self, cores: Sequence[Tensor], m: int, n: int) -> float:
        """Largest element of V^T V - I of the bases V, and of what lies in their padding beside the identity."""
        found = [0.0]
        for side in SIDES:
            given = self.of(cores, side, m, n)
            if given is None:
                continue
            basis, blocks = given
            identity = torch.eye(blocks.size, dtype=basis.dtype, device=basis.device)
            clean = torch.where(blocks.padding(basis.device), identity, basis)
            found += [float((basis - clean).abs().max()), float((clean.mT @ clean - identity).abs().max())]
        return max(found)


def turn(x: Tensor, basis: Tensor, blocks: Blocks, side: Side, *, inverse: bool = False) -> Tensor:
    """X V for a block-diagonal V on the columns, or V^T X on the rows; with `inverse`, X V^T or V X.

    V is (H, count, size, size), and H divides the G of X (G, m, n): G / H neighbours share a basis.
    """
    if side == "rows":
        return turn(x.mT, basis, blocks, "columns", inverse=inverse).mT
    shared = x.reshape(len(basis), -1, x.shape[-1])
    split = blocks.split(shared).swapaxes(1, 2)
    return blocks.join((split @ (basis.mT if inverse else basis)).swapaxes(1, 2)).reshape(x.shape)


def packed(symmetric: Tensor) -> Tensor:
    """Upper triangles of symmetric blocks, row by row: (G, count, size, size) to (G, count, size (size + 1) / 2)."""
    size, places = symmetric.shape[-1], _triangle(symmetric.shape[-1], symmetric.device)
    # Of a matrix: with more dimensions, a CPU selects twenty times as slowly.
    found: Tensor = symmetric.reshape(-1, size * size).index_select(1, places)
    return found.reshape(*symmetric.shape[:2], len(places))


def unpacked(triangles: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Undo `packed`, in another dtype."""
    whole: Tensor = triangles.flatten(0, 1).to(dtype).index_select(1, _symmetric(size, triangles.device))
    return whole.reshape(*triangles.shape[:2], size, size)


@lru_cache(maxsize=64)
def _triangle(size: int, device: torch.device) -> Tensor:
    """Places of the upper triangle in a flat (size, size) matrix."""
    rows, columns = torch.triu_indices(size, size)
    places: Tensor = (rows * size + columns).to(device)
    return places


@lru_cache(maxsize=64)
def _symmetric(size: int, device: torch.device) -> Tensor:
    """Place in the packed upper triangle of each element of a flat (size, size) matrix."""
    triangle = _triangle(size, torch.device("cpu"))
    places = torch.empty(size * size, dtype=torch.long)
    places[triangle] = places[triangle % size * size + triangle // size] = torch.arange(len(triangle))
    return places.to(device)


def eigenvectors(moment: Tensor, blocks: Blocks) -> Tensor:
    """Eigenvectors of symmetric blocks in columns, largest eigenvalue first, each with a positive largest element."""
    settled, _ = _settled(moment, blocks, padding=-1.0)
    on = settled.cpu() if settled.device.type == "mps" else settled
    with one_thread():  # LAPACK takes one block after the other, and divides none of this size with profit
        vectors: Tensor = torch.linalg.eigh(on).eigenvectors.flip(-1)
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return (vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)).to(moment.device)


def next_eigenvectors(moment: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Take a step of QR iteration in a basis whose columns are first sorted by their estimated eigenvalues.

    Args:
        moment: The moment in the basis V, which is V^T C V, (..., count, size, size).
        blocks: How the side is divided.

    Returns:
        The W with which V W is the next basis, and the permutation matrices that ordered the present one. The R of
        C V = Q R has Q = V W, where V^T C V = W R.

    Source: SOAP, Vyas et al. 2024, arXiv:2409.11321, algorithm 4.
    """
    settled, padding = _settled(moment, blocks, padding=1.0)
    estimates = settled.diagonal(dim1=-2, dim2=-1)
    estimates = torch.where(padding.diagonal(dim1=-2, dim2=-1), -1.0, estimates)  # the last direction stays last
    places = estimates.argsort(stable=True, dim=-1, descending=True)
    order = torch.nn.functional.one_hot(places, blocks.size).mT.to(moment.dtype)
    product = settled.gather(-1, places.unsqueeze(-2).expand_as(settled))
    with one_thread():
        q, r = torch.linalg.qr(product.cpu() if product.device.type == "mps" else product)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs.unsqueeze(-2)).to(moment.device), order


def orthonormalised(basis: Tensor) -> Tensor:
    """Take a step of Newton's iteration for the nearest orthogonal matrix, which squares the distance from it.

    Products of orthogonal matrices would move away from orthogonality by a rounding error each.
    """
    return 1.5 * basis - 0.5 * basis @ (basis.mT @ basis)


def _settled(moment: Tensor, blocks: Blocks, *, padding: float) -> tuple[Tensor, Tensor]:
    """Return a moment made definite, with a multiple of its mean eigenvalue in the padding, and the padding's mask."""
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] + torch.finfo(moment.dtype).tiny
    identity = torch.eye(blocks.size, dtype=moment.dtype, device=moment.device)
    mask = blocks.padding(moment.device)
    return torch.where(mask, padding * mean * identity, moment + RIDGE * mean * identity), mask
