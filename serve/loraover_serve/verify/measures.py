"""Measurements of logprobs with NumPy, as the judge takes them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from loraover_serve.engines.answers import Expected, Row, Rows, shared
from loraover_serve.judge.evidence import Change
from loraover_serve.judge.results import Off

Floats = NDArray[np.float64]


def measure(row: Row, change: Floats, direction: Floats) -> Change:
    """A change at the place of a row, along a direction.

    Args:
        row: The row.
        change: Change of its logprobs, in nats.
        direction: Direction, of the same tokens.
    """
    rest = change - direction
    size, total, far = (float(each @ each) for each in (direction, change, rest))
    return Change(row.question, len(change), float(change @ direction), size, total, far)


def between_arms(
    pairs: Iterable[tuple[Row, Row]], base: Expected, model: Expected, start: Expected | None = None
) -> list[Change]:
    """Project what an engine's adapter changes beyond one model on the direction from there to another model.

    Args:
        pairs: The engine's rows of the base model and of the adapter, with the same tokens.
        base: PyTorch's base model.
        model: The model in whose direction the change is measured, where it was run.
        start: The model where the direction starts; None for the base model.
    """
    found = []
    for one, two in pairs:
        if one in model:
            begin = base.like(one) if start is None else start.like(one)
            change = two.logprobs.astype(np.float64) - one.logprobs - (begin - base.like(one))
            found.append(measure(one, change, model.like(one) - begin))
    return found


def off(rows: Rows, expected: Expected) -> list[Off]:
    """Return the differences of rows from PyTorch's, where it was run.

    Args:
        rows: An engine's logprobs.
        expected: PyTorch's.
    """
    return [summed(row, row.logprobs - expected.like(row)) for row in rows if row in expected]


def summed(row: Row, difference: Floats) -> Off:
    """A difference of logprobs at the place of a row."""
    return Off(row.question, float(np.mean(np.square(difference))), float(np.abs(difference).max()))


def like(row: Row, expected: Expected) -> Row:
    """PyTorch's answer at the place of a row."""
    return Row(*row.place, expected.like(row).astype(np.float32), row.ids)


def in_order(rows: Rows) -> list[Row]:
    """Rows by question and position."""
    return sorted(rows, key=lambda row: row.place)


def centred(values: Floats) -> Floats:
    """Values without their mean."""
    found: Floats = values - values.mean()
    return found


def shared_difference(one: Row, other: Row) -> Floats:
    """Differences of two rows' logprobs, of the tokens that both have.

    If they share none, the likeliest token of one has at most the other's smallest logprob.
    """
    here, there = (row.logprobs.astype(np.float64) for row in shared(one, other))
    return here - there if len(here) else np.array([float(one.logprobs.max()) - float(other.logprobs.min())])


def mixed_off(together: Rows, alone: Rows) -> list[Off]:
    """Return the differences of answers sent together from those sent alone, at the places of both."""
    by_place = {row.place: row for row in alone}
    return [summed(row, shared_difference(row, by_place[row.place])) for row in together if row.place in by_place]
