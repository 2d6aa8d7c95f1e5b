"""Orthogonal bases of a matrix's side, block by block: how they are kept, applied and computed."""

from __future__ import annotations

from math import ceil
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

Side = Literal["rows", "columns"]

Bases = dict[Side, Tensor]
"""Measured bases of a site's sides, (count, size, size); the very same tensor where several sites share one."""

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
        """As few blocks of nearly equal length as fit."""
        count = ceil(length / largest)
        size = ceil(length / count)
        return cls(count, size, length - count * (size - 1))

    @property
    def length(self) -> int:
        """Length of the side."""
        return self.number * (self.size - 1) + self.full

    def split(self, x: Tensor) -> Tensor:
        """(..., length) to (..., count, size); shorter blocks get a zero at their end."""
        if self.full == self.number:
            return x.reshape(*x.shape[:-1], self.number, self.size)
        end = self.full * self.size
        long = x[..., :end].reshape(*x.shape[:-1], self.full, self.size)
        short = x[..., end:].reshape(*x.shape[:-1], self.number - self.full, self.size - 1)
        return torch.cat([long, pad(short, (0, 1))], -2)

    def join(self, x: Tensor) -> Tensor:
        """Undo `split`."""
        if self.full == self.number:
            return x.flatten(-2)
        return torch.cat([x[..., : self.full, :].flatten(-2), x[..., self.full :, : self.size - 1].flatten(-2)], -1)

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


def turn(x: Tensor, basis: Tensor, blocks: Blocks, side: Side, *, inverse: bool = False) -> Tensor:
    """X V for a block-diagonal V on the columns, or V^T X on the rows; with `inverse`, X V^T or V X.

    Args:
        x: (G, m, n).
        basis: The blocks of V, (H, count, size, size), where H divides G: G / H neighbours share a basis.
        blocks: How the side is divided.
        side: Which side of X to turn.
        inverse: Multiply by the transpose.
    """
    if side == "rows":
        return turn(x.mT, basis, blocks, "columns", inverse=inverse).mT
    shared = x.reshape(len(basis), -1, x.shape[-1])
    split = blocks.split(shared).transpose(1, 2)
    return blocks.join((split @ (basis.mT if inverse else basis)).transpose(1, 2)).reshape(x.shape)


def eigenvectors(moment: Tensor, blocks: Blocks) -> Tensor:
    """Eigenvectors of symmetric blocks, in columns, the largest eigenvalue first, each with a positive largest element.

    Args:
        moment: (..., count, size, size), positive semi-definite; its padding is not read.
        blocks: Division of the side, which says what is padding.

    Returns:
        The same shape and type, orthogonal.
    """
    settled, _ = _settled(moment, blocks, padding=-1.0)
    on = settled.cpu() if settled.device.type == "mps" else settled
    vectors: Tensor = torch.linalg.eigh(on).eigenvectors.flip(-1)
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return (vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)).to(moment.device)


def next_eigenvectors(moment: Tensor, basis: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Take a step of QR iteration from a basis whose columns are first sorted by their estimated eigenvalues.

    Args:
        moment: (..., count, size, size), positive semi-definite.
        basis: The same shape, orthogonal.
        blocks: Division of the side, which says what is padding.

    Returns:
        The next basis, and the permutation matrices that ordered the present one.

    Source: Vyas et al. 2024 (SOAP), arXiv:2409.11321, algorithm 4.
    """
    settled, padding = _settled(moment, blocks, padding=1.0)
    estimates = (basis * (settled @ basis)).sum(-2)
    estimates = torch.where(padding.diagonal(dim1=-2, dim2=-1), -1.0, estimates)  # the last direction stays last
    order = one_hot(estimates.argsort(stable=True, dim=-1, descending=True), blocks.size).mT.to(basis.dtype)
    product = settled @ basis @ order
    q, r = torch.linalg.qr(product.cpu() if product.device.type == "mps" else product)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs.unsqueeze(-2)).to(basis.device), order


def _settled(moment: Tensor, blocks: Blocks, *, padding: float) -> tuple[Tensor, Tensor]:
    """A moment that is definite, with this multiple of its mean eigenvalue as that of padding; and where that is."""
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] + torch.finfo(moment.dtype).tiny
    identity = torch.eye(blocks.size, dtype=moment.dtype, device=moment.device)
    mask = blocks.padding(moment.device)
    return torch.where(mask, padding * mean * identity, moment + RIDGE * mean * identity), mask
