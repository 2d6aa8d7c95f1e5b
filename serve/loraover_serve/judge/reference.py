"""A reference: questions, and what the right and the faulty models answer."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import string
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, final

from loraover.client.dialects import alone_with_text
from loraover.common.errors import CheckpointError
from loraover_serve.judge.limits import ADAPTER, BASE, MOST_BASES, NUMBER_FORMATS
from loraover_serve.judge.models import FaultyModel, Model, Models, Question
from loraover_serve.judge.names import COARSE_CACHE
from loraover_serve.judge.templates import Conversations

UNIT, STEPS_PER_E = 1e-4, 7
"""Nats of a recorded logprob, and characters in which the recorded difference of a fault grows e-fold.

Rounding to a character moves a difference by at most e^(1/14) - 1 = 7.4 %, less than the tenth that a fault may leave
unexplained (`judge/search.py`)."""

ALPHABET = f"{string.ascii_uppercase}0{string.ascii_lowercase}"
"""Characters of the recorded differences; capitals are negative. A smaller alphabet makes a smaller file."""

Kind = TypeVar("Kind")

LARGEST_FILE = 64_000_000  # bytes, unpacked

OF_ALL_BASES = ("schema_version", "adapter", "base_model", "bases", "vocabulary")
"""Parts that the bases of a reference have in common."""

FACTORS = (1 / 16, 1 / 8)
"""Factors that are tried beside the recorded ones: between those and none, answers are interpolated."""


@final
class Reference(Models):
    """A reference: questions, and what the right and the faulty models answered when it was recorded.

    Args:
        content: Contents of the file.

    Attributes:
        adapter_name: Name of the adapter's folder.
        base_name: Name of the base model.
        device: Device that PyTorch ran on.
        formats: Distance and strength of the right models in each number format.
        variants: Recorded faults of each arm.
        by_text: Ids of the tokens that alone have a text.
        caches: Long questions with one beginning, whose faults are stale keys and values of it; None if not recorded.
        weights_sha256: SHA-256 of the served weights; None if the base model's own were recorded.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        if content["schema_version"] not in (1, 2):
            raise ValueError(f"schema_version is {content['schema_version']!r}, expected 1 or 2")
        self.adapter_name, self.base_name, questions = (content[k] for k in ("adapter", "base_model", "questions"))
        if not isinstance(self.adapter_name, str) or not isinstance(self.base_name, str):
            raise ValueError("the adapter and its base model need names")
        self.ends = frozenset(map(int, content["ends"]))
        self.device = str(content.get("made", {}).get("device", "unknown"))
        self.sensitivity, self.vocabulary = float(content["sensitivity"]), int(content["vocabulary"])
        self.places = [(q, step) for q, each in enumerate(questions) for step in range(len(each["answer"]))]
        positions = content["positions"]
        if not 0 < len(self.places) == len(positions) or any(
            len(q["texts"]) != len(q["answer"]) or not isinstance(q["message"], str | None) for q in questions
        ):
            raise ValueError("questions and positions do not fit together")
        lists = [*(p["ids"] for p in positions), *(q[part] for q in questions for part in ("prompt", "answer"))]
        if any(type(i) is not int or not 0 <= i < self.vocabulary for ids in lists for i in ids) or not all(lists):
            raise ValueError(f"a token is not one of {self.vocabulary}")
        self.questions: list[Question] = [
            Question(tuple(q["prompt"]), tuple(q["answer"]), q["message"], q["texts"]) for q in questions
        ]
        self.base, self.adapter = (self._model(positions, arm) for arm in (BASE, ADAPTER))
        self.variants = {of: [self._variant(v) for v in content["variants"] if v["of"] == of] for of in (BASE, ADAPTER)}
        self.conversations = Conversations.of(content.get("chats"), self.vocabulary)
        self.by_text = alone_with_text((text, int(index)) for index, text in content["texts"].items())
        self.formats = {
            name: {part: float(content["formats"][name][part]) for part in ("distance", "strength")}
            for name in NUMBER_FORMATS[1:]
        }
        if not all(0 < each["distance"] < math.inf for each in self.formats.values()):
            raise ValueError("a number format has no distance")
        long = content.get("caches")
        self.caches = None if long is None else Reference({**content, **long, "caches": None, "bases": ()})
        variants = [] if self.caches is None else [each for arm in self.caches.variants.values() for each in arm]
        if self.caches and any(len(each.rows) != len(self.caches.places) for each in variants):
            raise ValueError("a stale cache does not fit the long questions")
        self.weights, self.weights_sha256, self.coarseness = _weights(content.get("weights"))
        others = content.get("bases", ())
        if len(others) >= MOST_BASES or any(set(each) & set(OF_ALL_BASES) for each in others):
            raise ValueError("its bases cannot be read")
        self._content, self._others = (content if others else {}), others
        kinds = [_weights({**content, **each}.get("weights")) for each in (content, *others)]
        self._digests = [sha256 for _, sha256, _ in kinds[1:]]
        self.finest = min((kind for *_, kind in kinds if kind), key=NUMBER_FORMATS.index, default=None)
        for index in range(len(others)):
            self.on_other(index)  # refuses what cannot be read; all of them together need much memory

    @property
    def other_bases(self) -> int:
        """Number of other weights of the base model on which the adapter was recorded, which a server may have."""
        return len(self._others)

    def on_other(self, index: int) -> Reference:
        """The same reference on other weights of the base model, which is read anew."""
        other = Reference({**self._content, **self._others[index], "bases": ()})
        other.finest = self.finest
        return other

    def on_weights(self, sha256: str | None) -> Reference:
        """The same reference on weights of the base model, if it holds them."""
        if sha256 == self.weights_sha256 or sha256 not in self._digests:
            return self
        return self.on_other(self._digests.index(sha256))

    @staticmethod
    def _model(positions: Sequence[Mapping[str, Any]], arm: str) -> Model:
        if any(not value >= 0 for p in positions for value in (*p[arm], p["floors"][arm])):
            raise ValueError(f"{arm}: a probability is above 1")
        rows = [{i: -UNIT * value for i, value in zip(p["ids"], p[arm], strict=True)} for p in positions]
        return Model(rows, [-UNIT * p["floors"][arm] for p in positions])

    def _variant(self, found: Mapping[str, Any]) -> Model:
        start, unit = self.adapter if found["of"] == ADAPTER else self.base, float(found["unit"])
        exact = [row for row, (q, _) in zip(start.rows, self.places, strict=True) if q < found["questions"]]
        if not 0 < sum(map(len, exact)) == len(found["levels"]) or not 0 <= unit < math.inf:
            raise ValueError(f"the fault {found['detail']!r:.60} does not fit the positions")
        factor = None if found.get("factor") is None else float(found["factor"])
        levels = iter(found["levels"])
        rows = [{i: value + unit * unpacked(next(levels)) for i, value in row.items()} for row in exact]
        return Model(rows, [0.0] * len(rows), str(found["fault"]), str(found["detail"]), factor)

    @property
    def facts(self) -> dict[str, Any]:
        """Facts of the reference for a report."""
        return {
            "adapter": self.adapter_name,
            "base_model": self.base_name,
            "sensitivity": self.sensitivity,
            "bias": self.formats["bf16"]["strength"],
            "prompts": len(self.questions),
            "new_tokens": max(len(question.answer) for question in self.questions),
            "device": self.device,
        }

    @property
    def factors(self) -> Sequence[float]:  # type: ignore[override]
        return (*FACTORS, *(factor for factor, _ in self._scaled if factor))

    @property
    def _scaled(self) -> list[tuple[float, Model]]:
        """The recorded factors on every delta_W, in their order."""
        known = [(each.factor, each) for each in self.variants[ADAPTER] if each.factor is not None]
        return sorted([(0.0, self.base), (1.0, self.adapter), *known], key=lambda pair: pair[0])

    def text(self, place: int) -> str | None:
        question, step = self.places[place]
        return self.questions[question].texts[step]

    def recorded(self, arm: str) -> Sequence[Model]:
        return self.variants.get(arm, ())

    def rounding(self, number_format: str) -> float:
        return self.formats[number_format]["distance"]

    def bias(self, number_format: str) -> float:
        return self.formats[number_format]["strength"]

    def scaled(self, factor: float, questions: int | None = None) -> Model:
        """Answers at a factor: a parabola through three recorded factors near it, or the outermost recorded one."""
        return between(self._scaled, factor)

    def adapter_faults(self) -> Iterable[FaultyModel]:
        return (_candidate(model) for model in self.variants[ADAPTER] if model.factor is None)

    def base_faults(self) -> Iterable[FaultyModel]:
        return (_candidate(model) for model in self.variants[BASE] if model.fault != COARSE_CACHE)

    def with_coarse_caches(self) -> Iterable[Model]:
        return (model for model in self.variants[BASE] if model.fault == COARSE_CACHE)


def between(known: Sequence[tuple[float, Model]], factor: float) -> Model:
    """Answers at a factor: a parabola through three known factors near it, or the outermost known one.

    Args:
        known: Factors in ascending order with the model of each, at least two.
        factor: Factor on every delta_W.
    """
    factor = min(max(factor, known[0][0]), known[-1][0])
    inner = range(1, len(known) - 1)
    middle = min(inner, key=lambda index: abs(known[index][0] - factor), default=1)  # of two, a line
    near = known[middle - 1 : middle + 2]
    weights = [math.prod((factor - other) / (one - other) for other, _ in near if other != one) for one, _ in near]
    rows = [
        {i: sum(weight * row[i] for weight, row in zip(weights, rows, strict=True)) for i in rows[0]}
        for rows in zip(*(model.rows for _, model in near), strict=False)
    ]
    return Model(rows, [0.0] * len(rows))


def _weights(found: Mapping[str, Any] | None) -> tuple[str | None, str | None, str | None]:
    """Served weights in words, their SHA-256 and their number format."""
    if found is None:
        return None, None, None
    name, sha256, number_format = found["format"], found["sha256"], found["number_format"]
    if number_format not in NUMBER_FORMATS:
        raise ValueError(f"the served weights have the number format {number_format!r:.60}")
    if not (isinstance(name, str) and isinstance(sha256, str) and len(sha256) == hashlib.sha256().digest_size * 2):
        raise ValueError("the served weights need a format and a SHA-256")
    return f"{name:.80} ({sha256:.12})", sha256, str(number_format)


def _candidate(model: Model) -> FaultyModel:
    return FaultyModel(model.fault, model.detail, lambda questions: model)


def unpacked(level: str) -> float:
    """Number of units for which a character stands."""
    return math.sinh((ALPHABET.index(level) - len(ALPHABET) // 2) / STEPS_PER_E)


def read_reference(path: Path) -> Reference:
    """Read a reference of logprobs.

    Args:
        path: Its file.

    Raises:
        CheckpointError: Not a reference of this version.
    """
    return read_as(path, Reference)


def read_as(path: Path, make: Callable[[Any], Kind]) -> Kind:
    """Read the file of a reference.

    Args:
        path: The file.
        make: Function that checks its contents, and returns the reference.

    Raises:
        CheckpointError: Not a reference of this version.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(LARGEST_FILE + 1)
        if len(raw) > LARGEST_FILE:
            raise ValueError(f"more than {LARGEST_FILE} bytes")
        return make(json.loads(raw))
    except (OSError, EOFError, zlib.error, RecursionError, RuntimeError, ArithmeticError) as error:
        fault: object = error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        fault = f"{type(error).__name__}: {error}"
    raise CheckpointError(
        f"{path}: not a reference that can be used ({fault!s:.300}); record it again: loraover record."
    )
