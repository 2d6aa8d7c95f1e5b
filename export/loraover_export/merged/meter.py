"""Sums over modules, whose rows are read from files and measured by several threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from loraover.common.errors import CheckpointError
from loraover_export.merged.changes import AddedDelta
from loraover_export.merged.matrices import HOLDERS, WIDE, Bytes, Overlap
from loraover_export.merged.strength import IMPRECISION, Hypothesis, Room, Sums, measure

SMALL = 2**18
"""Elements of a module below which everything is computed in float64, since that costs nothing there."""

MEAN, LARGEST = 1e-8, 1e9
"""Root mean square of delta_W from which on, and largest element up to which, float32 holds its fourth powers."""

SAMPLED = 2**20
"""Number of elements measured in a weight that equals the base model's, to see if a right merge would change it."""

READ_AT_ONCE = 2**21
"""Elements that a thread reads at once."""

ELEMENTS = 2**20
"""Number of elements that a thread measures at once, seven arrays of 4 MiB. Of smaller blocks, which stay in a
processor's own cache, two threads measure fewer than one, since they wait for Python's lock after each operation."""


class Meter:
    """Sums over modules, whose rows are read and measured by several threads.

    Args:
        pool: The threads.
        origin: File of the adapter's tensors.
    """

    def __init__(self, pool: ThreadPoolExecutor, origin: object) -> None:
        self._pool, self._origin, self._local = pool, origin, threading.local()

    def measure(
        self, places: Sequence[Overlap], delta: AddedDelta, hypotheses: Sequence[Hypothesis], share: int = 1
    ) -> Sums:
        """Return the sums over the elements of a module.

        Args:
            places: Where its weights are.
            delta: Its delta, as the weights are stored.
            hypotheses: Hypotheses to compute sums for.
            share: 1 to measure all rows, n to measure every nth run of rows.
        """
        total, narrow = Sums(), delta.to(_precision(places, delta))
        work = partial(self._rows, (narrow, delta), hypotheses)
        at_once = READ_AT_ONCE if share == 1 else SAMPLED // 16
        runs = [(place, *rows) for place in places for rows in _blocks(place, 0, place.rows, at_once)]
        for sums in self._pool.map(lambda run: work(*run), runs[::share]):
            total.add(sums)
        total.spread = delta.error(total.unit)
        return total

    def holds_same(self, places: Sequence[Overlap]) -> bool:
        """Whether the bytes of all rows are the base model's; the first rows that are not end the search."""
        if any(place.merged.type_name != place.base.type_name for place in places):
            return False
        runs = [(place, *rows) for place in places for rows in _blocks(place, 0, place.rows, READ_AT_ONCE)]
        return not runs or (self._equal(*runs[0]) and all(self._pool.map(lambda run: self._equal(*run), runs[1:])))

    def _room(self) -> Room:
        if not hasattr(self._local, "room"):
            self._local.room = Room()
        room: Room = self._local.room
        return room

    def _read(self, place: Overlap, start: int, stop: int) -> tuple[Bytes, Bytes]:
        """Return the bytes of some common rows, counted from the first one, of the base and of the merged weight."""
        room, found = self._room(), []
        for name, matrix, at in zip(("base", "merged"), (place.base, place.merged), place.at[1:], strict=True):
            memory = room.get(name, ((stop - start) * matrix.row_bytes,), np.uint8)
            found.append(matrix.raw(at + start, at + stop, memory))
        return found[0], found[1]

    def _equal(self, place: Overlap, start: int, stop: int) -> bool:
        one, other = (raw.reshape(-1) for raw in self._read(place, start, stop))
        words = one.size - one.size % 8
        same = one.size == other.size and np.array_equal(one[words:], other[words:])
        return same and np.array_equal(one[:words].view(np.uint64), other[:words].view(np.uint64))

    def _rows(
        self,
        deltas: tuple[AddedDelta, AddedDelta],
        hypotheses: Sequence[Hypothesis],
        place: Overlap,
        start: int,
        stop: int,
    ) -> Sums:
        """Return the sums over some common rows; blocks that float32 cannot sum are measured in float64."""
        raws, total = self._read(place, start, stop), Sums()
        for first, last in _blocks(place, start, stop):
            for delta in deltas:
                parts = tuple(raw[first - start : last - start] for raw in raws)
                sums = self._block(delta, hypotheses, place, parts, place.at[0] + first)
                if math.isfinite(sums.yy + sums.dd + sum(sums.moments) + sums.size):
                    break
            else:
                self._refuse(place, parts, deltas[1])
            total.add(sums)
        return total

    def _block(
        self,
        delta: AddedDelta,
        hypotheses: Sequence[Hypothesis],
        place: Overlap,
        parts: Sequence[Bytes],
        at: int,
    ) -> Sums:
        """Return the sums over a block, given its bytes in both files and its first row in the module's weight."""
        shape, dtype, room = (len(parts[0]), place.base.shape[1]), delta.left.dtype, self._room()
        base, merged, changes = (room.get(name, shape, dtype) for name in ("w", "m", "d"))
        with np.errstate(invalid="ignore", over="ignore"):
            place.base.decode(parts[0], base)
            nearest = place.merged.decode(parts[1], merged)
            delta.write(at, at + shape[0], changes)
            holds_base = place.merged.type_name in HOLDERS.get(place.base.type_name, ())
            return measure(
                base,
                merged,
                changes,
                nearest,
                hypotheses,
                reach=IMPRECISION**2 * delta.reach(at, at + shape[0]),
                is_quantised=place.merged.is_quantised,
                holds_base=holds_base,
                room=room,
            )

    def _refuse(self, place: Overlap, parts: Sequence[Bytes], delta: AddedDelta) -> None:
        """Raise an error that says which numbers of a block cannot be summed."""
        for matrix, raw in zip((place.base, place.merged), parts, strict=True):
            values = np.empty((len(raw), matrix.shape[1]))
            matrix.decode(raw, values)
            matrix.check(values)
        raise CheckpointError(
            f"{self._origin}: its delta is as large as {delta.largest():.2g}, whose squares cannot be summed; the run "
            "that wrote it had diverged."
        )


def _precision(places: Sequence[Overlap], delta: AddedDelta) -> Any:
    """Return the number format to compute in: float32 for large modules, if it shows what their formats round."""
    size = sum(place.rows * place.base.shape[1] for place in places)
    wide = any(place.merged.type_name in WIDE or place.base.type_name == "F64" for place in places)
    if size < SMALL or wide or not MEAN * math.sqrt(size) < delta.norm() or delta.largest() > LARGEST:
        return np.float64
    return np.float32


def _blocks(place: Overlap, start: int, stop: int, elements: int = ELEMENTS) -> Iterator[tuple[int, int]]:
    """Yield the first and the last row of each block of rows; no head whose rows are reordered is cut."""
    step = math.lcm(place.base.step, place.merged.step)
    rows = max(1, elements // max(1, place.base.shape[1] * step)) * step
    for first in range(start, stop, rows):
        yield first, min(stop, first + rows)
