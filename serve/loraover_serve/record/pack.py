"""Logprobs of models as a reference holds them: of the likeliest tokens alone, and of a fault what it changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraover_serve.engines.answers import ADAPTER, BASE, Expected, Question
from loraover_serve.record.adapter_check.reference import ALPHABET, STEPS_PER_E, UNIT

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RecordedPlace:
    """A token of an answer, and the tokens of which logprobs are recorded there.

    Args:
        question: Index of the question.
        position: Index of the last token that was read.
        ids: Token ids, the likeliest of the base model first.
    """

    question: int
    position: int
    ids: NDArray[np.int64]

    def of(self, model: Expected) -> Floats:
        """A model's logprobs of these tokens."""
        found: Floats = model.at(self.question, self.position)[self.ids].astype(np.float64)
        return found


def choose_places(
    questions: Sequence[Question], models: Sequence[Expected], faulty: Mapping[int, set[int]], kept: int
) -> list[RecordedPlace]:
    """The places of all questions, with the likeliest tokens of each model.

    Args:
        questions: The questions.
        models: The base model and the adapted model.
        faulty: Likeliest tokens of faulty models, by the index of the place.
        kept: Number of tokens of each model.
    """
    found: list[RecordedPlace] = []
    for index, question in enumerate(questions):
        for position in question.answered:
            rows = [model.at(index, position) for model in models]
            ids = {i for row in rows for i in likeliest(row, kept)} | faulty.get(len(found), set())
            found.append(
                RecordedPlace(index, position, np.array(sorted(ids, key=lambda i: -rows[0][i]), dtype=np.int64))
            )
    return found


def likeliest(row: NDArray[np.float32], number: int) -> list[int]:
    """Ids of the likeliest tokens."""
    if number >= len(row):
        return list(range(len(row)))
    return [int(i) for i in np.argpartition(-row, number)[:number]]


def pack_places(places: Sequence[RecordedPlace], base: Expected, adapter: Expected, kept: int) -> list[dict[str, Any]]:
    """The positions of a reference; see docs/formats.md."""
    return [
        {
            "ids": place.ids.tolist(),
            **{arm: _units(place.of(model)).tolist() for arm, model in ((BASE, base), (ADAPTER, adapter))},
            "floors": {arm: _floor(place, model, kept) for arm, model in ((BASE, base), (ADAPTER, adapter))},
        }
        for place in places
    ]


def _units(logprobs: Floats) -> NDArray[np.int64]:
    found: NDArray[np.int64] = np.maximum(np.rint(-logprobs / UNIT), 0).astype(np.int64)
    return found


def _floor(place: RecordedPlace, model: Expected, kept: int) -> int:
    """Logprob that no other token exceeds, in units: that of the last of the likeliest tokens."""
    values = np.sort(_units(place.of(model)))
    return int(values[min(kept, len(values)) - 1])


def pack_variant(places: Sequence[RecordedPlace], model: Expected, start: Expected, questions: int) -> dict[str, Any]:
    """Encode the changes by a faulty model as characters on a scale that is fine near zero.

    Args:
        places: The places of all questions.
        model: The faulty model.
        start: The model without the fault.
        questions: Number of questions that it was run on, the first ones.
    """
    off = np.concatenate([place.of(model) - place.of(start) for place in places if place.question < questions])
    middle = len(ALPHABET) // 2
    unit = float(f"{np.abs(off).max() / math.sinh(middle / STEPS_PER_E):.4g}")
    steps = np.arcsinh(off / unit) * STEPS_PER_E if unit > 0 else np.zeros_like(off)
    levels = np.clip(np.rint(steps).astype(int), -middle, middle) + middle
    return {"questions": questions, "unit": unit, "levels": "".join(ALPHABET[level] for level in levels)}
