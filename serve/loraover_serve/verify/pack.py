"""Questions and logprobs of models as a reference holds them: of the likeliest tokens; of a fault, only changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraover_serve.engines.answers import Expected, in_a_file
from loraover_serve.engines.endpoint import ids_by_text, text_of
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.models import Question
from loraover_serve.judge.names import COARSE_CACHE, LAYERS, NOT_APPLIED, SCALED, multiplied
from loraover_serve.judge.reference import ALPHABET, STEPS_PER_E, UNIT
from loraover_serve.judge.search import FEW_OF_BASE
from loraover_serve.verify.base_variants import CACHE_ROUNDINGS, base_faults
from loraover_serve.verify.faults import FAULTS, RightAdapter, misplaced, rescaled
from loraover_serve.verify.pytorch import TorchModels, likeliest
from loraover_serve.verify.variants import FaultyAdapter

KEPT = 16  # likeliest tokens of each model that are recorded: the next ones are noisier and make no interval narrower
KEPT_OF_FAULTS = 8
NAMED = 8  # questions on which a fault is recorded
NAMED_LAYERS = FEW_OF_BASE  # and one of the many that concern a single layer
FACTORS = (0.25, 0.5, 0.8, 0.9, 1.1, 1.25, 2.0, 4.0)
"""Factors on every delta_W that are recorded; between them a checker interpolates."""
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
    questions: Sequence[Question], models: Sequence[Expected], faulty: Mapping[int, set[int]]
) -> list[RecordedPlace]:
    """The places of all questions, with the likeliest tokens of each model."""
    found: list[RecordedPlace] = []
    for index, question in enumerate(questions):
        for position in question.answered:
            rows = [model.at(index, position) for model in models]
            ids = {i for row in rows for i in likeliest(row, KEPT)} | faulty.get(len(found), set())
            found.append(
                RecordedPlace(index, position, np.array(sorted(ids, key=lambda i: -rows[0][i]), dtype=np.int64))
            )
    return found


def pack_places(places: Sequence[RecordedPlace], base: Expected, adapter: Expected) -> list[dict[str, Any]]:
    """The positions of a reference; see docs/formats.md."""
    found = []
    for place in places:
        logprobs = {arm: place.of(model) for arm, model in ((BASE, base), (ADAPTER, adapter))}
        values = {arm: np.maximum(np.rint(-each / UNIT), 0).astype(np.int64) for arm, each in logprobs.items()}
        # no other token exceeds the last of the likeliest ones
        floors = {arm: int(np.sort(each)[min(KEPT, len(each)) - 1]) for arm, each in values.items()}
        ids = {"ids": place.ids.tolist()}
        found.append(ids | {arm: each.tolist() for arm, each in values.items()} | {"floors": floors})
    return found


def pack_variant(places: Sequence[RecordedPlace], model: Expected, start: Expected, questions: int) -> dict[str, Any]:
    """Encode the changes by a faulty model as characters on a scale that is fine near zero."""
    off = np.concatenate([place.of(model) - place.of(start) for place in places if place.question < questions])
    middle = len(ALPHABET) // 2
    unit = float(f"{np.abs(off).max() / math.sinh(middle / STEPS_PER_E):.4g}")
    steps = np.arcsinh(off / unit) * STEPS_PER_E if unit > 0 else np.zeros_like(off)
    levels = np.clip(np.rint(steps).astype(int), -middle, middle) + middle
    return {"questions": questions, "unit": unit, "levels": "".join(ALPHABET[level] for level in levels)}


@dataclass(frozen=True)
class RecordedFault:
    """A model with a fault.

    Args:
        of: Arm that has the fault.
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

    def packed(self, places: Sequence[RecordedPlace], models: TorchModels) -> dict[str, Any]:
        """The fault as the file of a reference has it."""
        start, number = models.expected[self.of], min(self.questions, len(models.questions))
        facts = {"of": self.of, "fault": self.fault, "detail": self.detail, "factor": self.factor}
        return facts | pack_variant(places, self.model, start, number)


def main_faults(models: TorchModels) -> Iterator[RecordedFault]:
    """Faults of the entire adapter, and the adapter with other factors."""
    variants, subject = models.variants, models.subject
    left = (LAYERS, NOT_APPLIED)  # recorded on fewer questions; the base model's own answers
    known = (each for find in FAULTS for each in find(subject) if each.fault not in left)
    scaled = (FaultyAdapter(SCALED, multiplied(f), rescaled(subject, f), factor=f) for f in FACTORS)
    at = list(_places(models))
    for each, model in variants.adapted_each(chain(known, scaled), subject.deltas, NAMED):
        held = Expected(dict(zip(at, in_a_file(np.stack([model.at(*place) for place in at])), strict=True)))
        yield RecordedFault(ADAPTER, each.fault, each.detail, held, NAMED, each.factor)


def many_faults(models: TorchModels) -> Iterator[RecordedFault]:
    """Faults of single layers of the adapter, those of the base model, and a coarse cache, which is not a fault."""
    variants, subject = models.variants, models.subject
    for each, model in variants.adapted_each(misplaced(subject), subject.deltas, NAMED_LAYERS):
        yield RecordedFault(ADAPTER, each.fault, each.detail, model, NAMED_LAYERS)
    for way, model in variants.with_coarse_caches(NAMED):
        yield RecordedFault(BASE, COARSE_CACHE, f"keys and values are {way} to float8", model, NAMED)
    for fault, detail, model in variants.base_each(NAMED_LAYERS):
        yield RecordedFault(BASE, fault, detail, model, NAMED_LAYERS)


def planned_passes(model: Any, subject: RightAdapter, number: int, longest: int) -> list[float]:
    """Cost of each of `main_faults` and `many_faults`, in passes of the model over one question.

    Args:
        model: The base model.
        number: Number of questions.
        longest: Number of tokens of the longest prompt.
    """
    named, few = min(NAMED, number), min(NAMED_LAYERS, number)
    main = sum(each.fault not in (LAYERS, NOT_APPLIED) for find in FAULTS for each in find(subject))
    layers = max(1, model.config.get_text_config().num_hidden_layers)
    firsts = [each.layer for each in misplaced(subject)] + [each.layer for each in base_faults(model, longest)]
    return [named] * (main + len(FACTORS) + len(CACHE_ROUNDINGS)) + [few * (1 - at / layers) for at in firsts]


def faulty_tops(models: TorchModels, faults: Sequence[RecordedFault]) -> dict[int, set[int]]:
    """The likeliest tokens of faulty models, by the index of the place."""
    found: dict[int, set[int]] = {}
    for index, place in enumerate(_places(models)):
        rows = (fault.model.at(*place) for fault in faults)
        found[index] = {i for row in rows for i in likeliest(row, KEPT_OF_FAULTS)}
    return found


def _places(models: TorchModels) -> Iterator[tuple[int, int]]:
    return ((q, position) for q, each in enumerate(models.questions[:NAMED]) for position in each.answered)


def texts_of(tokenizer: Any, ids: Sequence[int]) -> dict[str, str]:
    """The texts by which a server may name these tokens, by their ids: those that no other token of all has.

    Halves of characters all decode to U+FFFD, and many decoders strip the space before a word.
    """
    known = ids_by_text(tokenizer)
    decoded = {i: str(tokenizer.decode([i])) for i in ids}
    return {str(i): text for i, text in decoded.items() if known.get(text) == i}


def pack_question(tokenizer: Any, mine: Question) -> dict[str, Any]:
    """A question in the forms that servers take: token ids, the text of these tokens, and the message of a chat."""
    texts = [text_of(tokenizer, mine.tokens[: position + 1]) for position in mine.answered]
    return {"prompt": list(mine.prompt), "answer": list(mine.answer), "texts": texts, "message": mine.message}
