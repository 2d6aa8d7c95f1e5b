"""Which of many adapters a server answers with: the one with the nearest recorded answers to the same questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from loraover_serve.judge.limits import ADAPTER
from loraover_serve.record.adapter_check.asker import Asker
from loraover_serve.record.adapter_check.reference import Reference, Row

NEAREST = 3
"""References by which a server is checked, of those that have the same questions."""
SCREENED, SHARED = 16, 3
"""Questions that are asked once, and the fewest of them that a reference has to have."""

Named = tuple[str, Callable[[], Reference]]
"""Name of an adapter on the server, and what gives its reference: hundreds do not fit into memory together."""


def nearest(asker: Asker, others: Sequence[Named]) -> list[Named]:
    """Adapters with which a server may answer: the nearest first, and then those with other questions.

    The server is asked SCREENED questions, however many adapters there are. One that is further off than the right
    adapter is left out.

    Args:
        asker: The server, with the reference by which it differs.
        others: The other adapters.
    """
    mine = asker.reference
    places = [place for place in asker.places if mine.places[place][1] == 0][:SCREENED]
    rows = asker.rounds(ADAPTER, places)[0].rows
    answers = {tuple(mine.read(place)): rows[place] for place in places if place in rows}
    far = [_distance(read(), answers) for _, read in others]
    right = _distance(mine, answers) or math.inf
    known = sorted((value, at) for at, value in enumerate(far) if value is not None and value < right)
    return [others[at] for _, at in known[:NEAREST]] + [others[at] for at, value in enumerate(far) if value is None]


def _distance(reference: Reference, answers: dict[tuple[int, ...], Row]) -> float | None:
    """RMS distance of answers from an adapter's, in nats; None if it has too few of the questions."""
    squares = []
    for place, (_, step) in enumerate(reference.places):
        row = answers.get(tuple(reference.read(place))) if step == 0 else None
        if row is not None:
            squares.append(fmean(off * off for off in reference.adapter.off(place, row)))
    return math.sqrt(fmean(squares)) if len(squares) >= SHARED else None
