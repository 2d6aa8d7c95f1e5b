"""Which of many adapters a server answers with: the one with the nearest recorded answers to the same questions."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

from loraover_serve.judge.limits import ADAPTER
from loraover_serve.record.adapter_check.asker import Asker
from loraover_serve.record.adapter_check.reference import Reference, Row

NEAREST = 3
"""References by which a server is checked, of those that have the same questions."""
SCREENED, SHARED = 16, 3
"""Questions that are asked once, and the fewest of them that a reference has to have."""


class Named(NamedTuple):
    """An adapter on a server.

    Args:
        name: Its name there.
        read: Returns its reference: hundreds do not fit into memory together.
    """

    name: str
    read: Callable[[], Reference]


class Search:
    """The search for the adapter with which a server answers in the place of another one.

    The server is asked SCREENED questions, however many adapters there are.

    Args:
        asker: The server, with the reference by which it differs.
    """

    def __init__(self, asker: Asker) -> None:
        mine = asker.reference
        places = [place for place in asker.places if mine.places[place][1] == 0][:SCREENED]
        rows = asker.rounds(ADAPTER, places)[0].rows
        self._answers = {tuple(mine.read(place)): rows[place] for place in places if place in rows}
        self._right = self._distance(mine) or math.inf
        self._nearer: list[tuple[float, Named]] = []
        self._unknown: list[Named] = []

    def compare(self, other: Named, reference: Reference) -> None:
        """Compare the answers with those of another adapter; one that is further off than the right one is left out.

        Args:
            other: The adapter.
            reference: Its reference.
        """
        far = self._distance(reference)
        if far is None:
            self._unknown.append(other)
        elif far < self._right:
            self._nearer.append((far, other))

    def nearest(self) -> list[Named]:
        """Adapters with which the server may answer: the nearest first, and then those with other questions."""
        known = sorted(self._nearer, key=lambda pair: pair[0])
        return [other for _, other in known[:NEAREST]] + self._unknown

    def _distance(self, reference: Reference) -> float | None:
        """RMS distance of the answers from an adapter's, in nats; None if it has too few of the questions."""
        squares = []
        for place, (_, step) in enumerate(reference.places):
            row: Row | None = self._answers.get(tuple(reference.read(place))) if step == 0 else None
            if row is not None:
                squares.append(fmean(off * off for off in reference.adapter.off(place, row)))
        return math.sqrt(fmean(squares)) if len(squares) >= SHARED else None
