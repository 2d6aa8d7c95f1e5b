"""The weights of the base model that a server has, of those on which an adapter was recorded."""

from __future__ import annotations

import math
from statistics import fmean

from loraover_serve.judge.asker import Asker
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.reference import Reference

SCREENED = 16
"""Number of questions that are asked once, to find out on which weights or with which adapter a server answers."""


def on_served_weights(asker: Asker) -> Asker:
    """Ask a server's base model, and return an asker whose reference has the weights that its answers fit best.

    Nothing is asked of a server if its reference has one base alone. If none of the bases fits, the nearest is judged,
    and found to be another one.

    Raises:
        EngineError: A server that refuses, or whose answers cannot be read.
    """
    known = asker.models
    if not isinstance(known, Reference) or not known.bases:
        return asker
    places = [place for place in asker.places if known.places[place][1] == 0][:SCREENED]
    arm = ADAPTER if asker.is_one_model else BASE
    rows = {tuple(known.read(place)): row for place, row in asker.rounds(arm, places)[0].rows.items()}
    nearest = min((known, *known.bases), key=lambda each: _distance(each, arm, rows))
    return Asker(nearest, asker.speaker, asker.names, asker.find_other)


def _distance(reference: Reference, arm: str, rows: dict[tuple[int, ...], dict[int, float]]) -> float:
    """RMS distance of answers from a recorded model's, in nats; infinite if it has none of the questions."""
    model = reference.adapter if arm == ADAPTER else reference.base
    squares = []
    for place, (_, step) in enumerate(reference.places):
        row = rows.get(tuple(reference.read(place))) if step == 0 else None
        if row is not None:
            squares.append(fmean(off * off for off in model.off(place, row)))
    return math.sqrt(fmean(squares)) if squares else math.inf
