"""Turns of one conversation among examples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from loraover.data.formats import Row


def later_turn(rows: Sequence[Row]) -> int | None:
    """Return the index of the first example that is a later turn of the conversation before it, or None.

    Args:
        rows: Examples in the order of the data, in which the turns of a conversation are neighbours.
    """
    return next((i for i, (one, following) in enumerate(pairwise(rows), 1) if _continues(one, following)), None)


def _continues(one: Row, following: Row) -> bool:
    """Whether an example's prompt begins with all messages of another example."""
    if not {"prompt", "completion"} <= one.keys() & following.keys():
        return False
    messages = [*one["prompt"], *one["completion"]]
    return list(following["prompt"][: len(messages)]) == messages
