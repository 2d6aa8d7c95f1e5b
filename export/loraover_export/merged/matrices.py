"""Matrices in a model's files, read some rows at a time, and the number formats in which they are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraover.checkpoint.tensor_file import TensorFile
from loraover.common.errors import CheckpointError

Numbers = NDArray[np.floating[Any]]
Bytes = NDArray[np.uint8]

Rounding = Callable[[Numbers, Numbers], None]
"""Function that rounds the first array to the nearest numbers of a format, and writes them into the second one. Both
have the same shape and dtype, and may be the same array."""


class StoredMatrix(ABC):
    """A matrix in a file.

    Attributes:
        name: File and key, for messages.
        shape: Number of rows and columns as they are stored.
        type_name: Number format, by its name in the file, such as "BF16".
        step: Number of rows that must be read together; reads are multiples of it.
        is_quantised: Whether elements of a block share a scale.
    """

    name: str
    shape: tuple[int, int]
    type_name: str
    step: int = 1
    is_quantised: bool = False

    @property
    @abstractmethod
    def unreadable(self) -> str | None:
        """Reason why the numbers cannot be read, in words; None if they can."""

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """Number of bytes of a row."""

    @abstractmethod
    def raw(self, start: int, stop: int, room: Bytes | None = None) -> Bytes:
        """Return the bytes of some rows as the file holds them, a row in each, in memory of which `room` is the start.

        Args:
            start: First of the rows.
            stop: First row behind them.
            room: At least as many bytes, which are overwritten; None for new memory.
        """

    @abstractmethod
    def decode(self, raw: Bytes, out: Numbers) -> Rounding | None:
        """Write the elements of some rows into float32 or float64.

        Returns:
            The rounding of elements to the nearest numbers that the format has at their places; None if the numbers
            of the format are not known.
        """

    def in_file_order(self) -> StoredMatrix | None:
        """Return the matrix with its rows in the file's order; None if this is transformers' order."""
        return None

    def order(self) -> NDArray[np.intp]:
        """Return the number in the file of each row in transformers' order."""
        return np.arange(self.shape[0])

    @property
    @abstractmethod
    def identity(self) -> tuple[str, int]:
        """File, key and first element or row, by which matrices are distinguished."""

    def check(self, values: Numbers) -> None:
        """Raise CheckpointError if elements that were read are not finite."""
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{self.name} holds NaN or infinity; expected finite weights. Merge or download the model again."
            )


def _bf16(raw: Bytes, out: Numbers) -> None:
    halves = raw.view("<u2").reshape(out.shape)
    if out.dtype == np.float32 and out.flags.c_contiguous:
        bits = out.view(np.uint32)
        np.left_shift(halves, np.uint32(16), out=bits, dtype=np.uint32)
    else:
        out[...] = (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _plain(dtype: str) -> Callable[[Bytes, Numbers], None]:
    def decode(raw: Bytes, out: Numbers) -> None:
        np.copyto(out, raw.view(dtype).reshape(out.shape), casting="same_kind")

    return decode


def _nearest_f32(values: Numbers, out: Numbers) -> None:
    out[...] = values.astype(np.float32, copy=False)


def nearest_bf16(values: Numbers, out: Numbers) -> None:
    """Round to the nearest numbers of bfloat16, ties to even."""
    if values.dtype != np.float32:
        narrow = values.astype(np.float32)
        nearest_bf16(narrow, narrow)
        out[...] = narrow
        return
    bits, found = values.view(np.uint32), out.view(np.uint32)
    odd = found if out is not values else np.empty_like(found)
    np.right_shift(bits, np.uint32(16), out=odd)
    np.bitwise_and(odd, np.uint32(1), out=odd)
    np.add(odd, np.uint32(0x7FFF), out=odd)
    np.add(odd, bits, out=found)
    np.bitwise_and(found, np.uint32(0xFFFF0000), out=found)


def nearest_f16(values: Numbers, out: Numbers) -> None:
    """Round to the nearest numbers of float16, ties to even; larger numbers become infinite."""
    with np.errstate(over="ignore"):
        out[...] = values.astype(np.float16)


def near_bf16(values: Numbers, out: Numbers) -> None:
    """Round to the nearest numbers of bfloat16, ties away from zero, in half the time of `nearest_bf16`."""
    if values.dtype != np.float32:
        nearest_bf16(values, out)
        return
    bits = out.view(np.uint32)
    np.add(values.view(np.uint32), np.uint32(0x8000), out=bits)
    np.bitwise_and(bits, np.uint32(0xFFFF0000), out=bits)


class Float(NamedTuple):
    """A floating-point format: bytes of an element, its decoding, and the rounding to one of its nearest numbers."""

    size: int
    decode: Callable[[Bytes, Numbers], None]
    nearest: Rounding


FLOATS = {
    "F64": Float(8, _plain("<f8"), lambda values, out: np.copyto(out, values)),
    "F32": Float(4, _plain("<f4"), _nearest_f32),
    "F16": Float(2, _plain("<f2"), nearest_f16),
    "BF16": Float(2, _bf16, near_bf16),
}
"""Floating-point formats by the names that safetensors and GGUF share."""

WIDE = ("F64", "F32")
"""Formats as fine as float32 or finer, whose rounding needs float64."""

HOLDERS = {"F64": {"F64"}, "F32": {"F32", "F64"}, "F16": {"F16", "F32", "F64"}, "BF16": {"BF16", "F32", "F64"}}
"""Formats that hold every number of a format exactly."""


@dataclass(frozen=True)
class StoredRows(StoredMatrix):
    """Rows of a tensor in a safetensors file: all rows of a matrix, or one expert's part of a stack."""

    file: TensorFile
    key: str
    shape: tuple[int, int]
    first: int = 0

    @property
    def identity(self) -> tuple[str, int]:
        return self.name, self.first

    @property
    def name(self) -> str:  # type: ignore[override]
        """File and key."""
        return f"{self.file.path}: {self.key}"

    @property
    def type_name(self) -> str:  # type: ignore[override]
        """Data type as safetensors spells it."""
        return self.file.dtype(self.key)

    @property
    def unreadable(self) -> str | None:
        return None if self.type_name in FLOATS else f"{self.key} is {self.type_name}, a quantised or an integer type"

    @property
    def row_bytes(self) -> int:
        # Of types with less than a byte for an element, rows end within bytes; these are compared as a whole.
        return self.shape[1] * self.file.size(self.key) // max(1, prod(self.file.shape(self.key)))

    def raw(self, start: int, stop: int, room: Bytes | None = None) -> Bytes:
        size, first = self.row_bytes, self.first * self.row_bytes // max(1, self.shape[1])
        found = self.file.part(self.key, first + start * size, (stop - start) * size, room)
        return found.reshape(stop - start, size)

    def decode(self, raw: Bytes, out: Numbers) -> Rounding:
        kind = FLOATS[self.type_name]
        kind.decode(raw.reshape(-1), out)
        return kind.nearest


class TensorPiece(NamedTuple):
    """Matrix that holds rows of a module's weight as it is stored: all rows, or a part of a fused projection."""

    matrix: StoredMatrix
    transposed: bool


def rows_of(pieces: Sequence[TensorPiece]) -> int:
    """Return the number of rows of several pieces as they are stored."""
    return sum(piece.matrix.shape[0] for piece in pieces)


class Overlap(NamedTuple):
    """Rows that a piece of the base model's weight shares with a piece of the merged weight.

    Args:
        base: Matrix of the base model.
        merged: Matrix of the merged model.
        at: Index of the first of these rows in the module's stored weight, in `base`, and in `merged`.
        rows: Number of rows.
    """

    base: StoredMatrix
    merged: StoredMatrix
    at: tuple[int, int, int]
    rows: int


def overlaps(base: Sequence[TensorPiece], merged: Sequence[TensorPiece]) -> Iterator[Overlap]:
    """Yield the common rows of two weights with the same number of rows; each weight may lie in several matrices."""
    at, ends = 0, [0, 0]
    sides = [iter(base), iter(merged)]
    now: list[StoredMatrix | None] = [None, None]
    while at < rows_of(base):
        for side in (0, 1):
            if at == ends[side]:
                now[side] = matrix = next(sides[side]).matrix
                ends[side] += matrix.shape[0]
        first, second = now
        assert first is not None
        assert second is not None
        rows = min(ends) - at
        yield Overlap(first, second, (at, at - ends[0] + first.shape[0], at - ends[1] + second.shape[0]), rows)
        at += rows
