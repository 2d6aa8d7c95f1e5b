"""The faults of serving that a reference has beside the right models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from loraover_serve.engines.answers import ADAPTER, BASE, Expected, Row, in_a_file
from loraover_serve.judge.base_faults import FEW
from loraover_serve.judge.names import COARSE_CACHE, LAYERS, NOT_APPLIED, SCALED, multiplied
from loraover_serve.record.pack import RecordedPlace, likeliest, pack_variant
from loraover_serve.verify.faults import FAULTS, FaultyAdapter, RightAdapter, misplaced, rescaled
from loraover_serve.verify.reference import TorchReference
from loraover_serve.verify.variants import Variants

KEPT_OF_FAULTS = 8
NAMED = 8  # questions on which a fault is recorded
NAMED_LAYERS = FEW  # and one of the many that concern a single layer
FACTORS = (0.25, 0.5, 0.8, 0.9, 1.1, 1.25, 2.0, 4.0)
"""Factors on every delta_W that are recorded; between them a checker interpolates."""


@dataclass(frozen=True)
class RecordedFault:
    """A model with a fault.

    Args:
        of: Arm that has the fault.
        fault: Name of the fault.
        detail: The fault in words.
        model: Its logprobs.
        questions: Number of questions that it was run on, the first ones.
        factor: Factor on every delta_W, for a fault that is one.
    """

    of: str
    fault: str
    detail: str
    model: Expected
    questions: int
    factor: float | None = None

    def packed(self, places: Sequence[RecordedPlace], reference: TorchReference) -> dict[str, Any]:
        """The fault as a reference has it."""
        start = reference.adapter if self.of == ADAPTER else reference.base
        number = min(self.questions, len(reference.questions))
        facts = {"of": self.of, "fault": self.fault, "detail": self.detail, "factor": self.factor}
        return facts | pack_variant(places, self.model, start, number)


def main_faults(reference: TorchReference, variants: Variants, subject: RightAdapter) -> Iterator[RecordedFault]:
    """Faults of the entire adapter, and the adapter with other factors.

    Args:
        reference: PyTorch's answers of the right models.
        variants: The base model with changed adapters.
        subject: The adapter.
    """
    scaled = ((FaultyAdapter(SCALED, multiplied(f), rescaled(subject, f)), f) for f in FACTORS)
    left = (LAYERS, NOT_APPLIED)  # recorded on fewer questions; the base model's own answers
    known = ((each, None) for find in FAULTS for each in find(subject) if each.fault not in left)
    for each, factor in chain(known, scaled):  # each is an adapter, and only one is held
        model = variants.adapted(each.deltas, with_others=each.with_others, prompts=NAMED, source=each.source)
        yield RecordedFault(ADAPTER, each.fault, each.detail, _kept(model, reference), NAMED, factor)


def _kept(model: Expected, reference: TorchReference) -> Expected:
    """The model's logprobs of the first questions, in a file."""
    places = list(_places(reference))
    held = in_a_file(np.stack([model.at(*place) for place in places]))
    return Expected([Row(*place, row) for row, place in zip(held, places, strict=True)])


def many_faults(reference: TorchReference, variants: Variants, subject: RightAdapter) -> Iterator[RecordedFault]:
    """Faults of single layers of the adapter, those of the base model, and a coarse cache, which is none.

    Args:
        reference: PyTorch's answers of the right models.
        variants: The base model with changed adapters.
        subject: The adapter.
    """
    for each in misplaced(subject):
        model = variants.adapted(each.deltas, prompts=NAMED_LAYERS, layer=each.layer)
        yield RecordedFault(ADAPTER, each.fault, each.detail, model, NAMED_LAYERS)
    for way, model in variants.with_coarse_caches():
        yield RecordedFault(BASE, COARSE_CACHE, f"keys and values are {way} to float8", model, NAMED)
    for base_fault in variants.base_faults():
        model = base_fault.run(NAMED_LAYERS)
        yield RecordedFault(BASE, base_fault.fault, base_fault.detail, model, NAMED_LAYERS)


def faulty_tops(reference: TorchReference, faults: Sequence[RecordedFault]) -> dict[int, set[int]]:
    """The likeliest tokens of faulty models, by the index of the place."""
    found: dict[int, set[int]] = {}
    for index, place in enumerate(_places(reference)):
        rows = (fault.model.at(*place) for fault in faults)
        found[index] = {i for row in rows for i in likeliest(row, KEPT_OF_FAULTS)}
    return found


def _places(reference: TorchReference) -> Iterator[tuple[int, int]]:
    return ((q, position) for q, each in enumerate(reference.questions[:NAMED]) for position in each.answered)
