"""A reference of vectors: texts, and what the right and the faulty models answer to each of them.

A row is the vector of a text, the logits of a classifier, or the score of a pair. `record` keeps the rows of the base
model and of the adapter as the model computes them, in float32, and those of faults as differences in steps of a 127th
of the largest one in a row. Here they become the answers that a server should give, as *models* of the judge: a row has
a number for each component, and all are in units in which the components of right answers have the RMS value SIZE.
The judge's limits in nats, such as its floor of 1e-4, then stand for 1e-5 of a vector's size.
"""

from __future__ import annotations

import base64
import math
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, final

from loraover_serve.judge.limits import ADAPTER, BASE, NUMBER_FORMATS
from loraover_serve.judge.models import FaultyModel, Model, Models, Question
from loraover_serve.judge.names import FLIPPED, RAW
from loraover_serve.judge.reference import Reference, between, read_as

KIND = "vectors"
"""Name of this kind of reference in its file; a file of logprobs names none."""

VectorTask = Literal["embed", "classify", "score", "token_classify"]
VECTOR_TASKS: tuple[VectorTask, ...] = ("embed", "classify", "score", "token_classify")
"""Tasks: the vector of a text, its classes, the score of a pair of texts, and the classes of every token."""

POOLINGS = ("mean", "cls", "last", "max")
"""Ways to make one vector of those of tokens: their mean, the first or the last one, or the largest numbers."""

MOST_SENSITIVE = 1e3
"""Largest ratio by which rounding moves the adapted model further than the base model."""

SIZE = 10.0
"""RMS value of a component of right answers, in the units of the judge."""

LEVELS = 127  # steps of the largest difference in a row of a fault
LEAST = 1e-37  # smallest probability that float32 holds with all of its digits
SURELY = 1 - 1e-6  # largest output of a sigmoid in float32 that tells the logit to a few percent
SUM = 1e-3  # by which probabilities of classes may miss the sum 1

Vector = Sequence[float]


class VectorQuestion(NamedTuple):
    """A text that is asked for.

    Args:
        text: The text, or the query of a pair.
        pair: Document of the pair; None for a single text.
        tokens: Number of its tokens, with the prefix and with special tokens.
    """

    text: str
    pair: str | None
    tokens: int


@dataclass(frozen=True)
class VectorSetting:
    """A way in which a server may compute both models, such as another pooling; the right way has no fault.

    Args:
        fault: Name of the fault; empty for the right way.
        detail: The fault in words.
        rows: Function that returns the rows of an arm as the model computes them: those of the first questions.
        is_flipped: Whether vectors are normalised but should not be, or the reverse.
        order: Place of each component in the right rows; empty for the right order.
        dimensions: Number of the first components that the server returns; None means all.
    """

    fault: str
    detail: str
    rows: Callable[[str], list[Vector]]
    is_flipped: bool = False
    order: Sequence[int] = ()
    dimensions: int | None = None


@final
class VectorReference:
    """A reference of vectors, as it was recorded.

    Args:
        content: Contents of the file.

    Attributes:
        adapter_name: Name of the adapter's folder.
        base_name: Name of the base model.
        task: The task.
        labels: Names of the classes in their order; empty for vectors.
        activation: Function that a server applies to logits by default: softmax or sigmoid; None for vectors, and for
            numbers that a regression estimates.
        is_normalised: Whether vectors have the length 1.
        prefix: Text that the server puts before each input.
        pooling: Way in which one vector is made of those of tokens; None for classes and scores.
        questions: The texts.
        rows: Rows of both arms, as the model computes them.
        formats: Distance and strength of the right models in each number format.
        sensitivity: Ratio by which rounding to bfloat16 moves the adapted model further than the base model.
        sensitivities: This ratio in each number format.
        device: Device that PyTorch ran on.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        if (content["schema_version"], content["kind"]) != (1, KIND):
            raise ValueError(f"schema_version and kind are not 1 and {KIND}")
        self.adapter_name, self.base_name = content["adapter"], content["base_model"]
        if not isinstance(self.adapter_name, str) or not isinstance(self.base_name, str):
            raise ValueError("the adapter and its base model need names")
        if content["task"] not in VECTOR_TASKS or content["activation"] not in (None, "softmax", "sigmoid"):
            raise ValueError("an unknown task or activation")
        self.task: VectorTask = content["task"]
        self.labels, self.activation = [str(each) for each in content["labels"]], content["activation"]
        if (self.task == "embed") != (not self.labels) or len({*self.labels}) < len(self.labels):
            raise ValueError("a classifier needs labels with different names, and a vector has none")
        self.is_normalised, self.prefix = bool(content["normalised"]), str(content["prefix"])
        self.pooling: str | None = content["pooling"]
        if self.pooling not in (POOLINGS if self.task == "embed" else (None,)):
            raise ValueError("pooling must be a known one for vectors, otherwise null")
        self.questions = [_question(each, is_pair=self.task == "score") for each in content["questions"]]
        self.sensitivity, self.device = float(content["sensitivity"]), str(content["made"]["device"])
        self._lengths = [int(each["numbers"]) for each in content["questions"]]
        if len(self.questions) < 2 or not all(0 < each < 2**20 for each in self._lengths):
            raise ValueError("fewer than two questions, or a row without numbers")
        if any(each % max(1, len(self.labels)) for each in self._lengths):
            raise ValueError("a row does not have a number for each label")
        self.rows = {arm: _rows(content["rows"][arm], self._lengths) for arm in (BASE, ADAPTER)}
        self.formats = {
            name: {part: float(content["formats"][name][part]) for part in ("distance", "strength")}
            for name in NUMBER_FORMATS[1:]
        }
        self.sensitivities = {
            name: float(content["formats"][name].get("sensitivity", self.sensitivity)) for name in self.formats
        }
        if not all(0 < each["distance"] < math.inf > abs(each["strength"]) for each in self.formats.values()):
            raise ValueError("a number format has no distance or no strength")
        self._models: dict[tuple[str, str], VectorModels] = {}
        self._far: dict[tuple[str, str, str], list[float]] = {}
        self._settings = [self._recorded(each, (BASE, ADAPTER)) for each in content["settings"]]
        self._variants = [self._recorded(each, (ADAPTER,)) for each in content["variants"]]
        if not 0 < self.unit < math.inf or not all(
            1 <= each <= MOST_SENSITIVE for each in (self.sensitivity, *self.sensitivities.values())
        ):
            raise ValueError(f"all rows are zero, or the sensitivity is below 1 or above {MOST_SENSITIVE:g}")

    def _recorded(self, found: Mapping[str, Any], arms: Sequence[str]) -> tuple[VectorSetting, float | None]:
        """A recorded fault, with its factor; its differences are checked now, and added to the right rows on demand."""
        number = found["questions"]
        if type(number) is not int or not 1 <= number <= len(self.questions):
            raise ValueError(f"the fault {found['detail']!r:.60} has no questions")
        off = {arm: _differences(found[arm], self._lengths[:number]) for arm in arms}

        def rows(arm: str) -> list[Vector]:
            right = self.rows[arm][:number]
            return [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(right, off[arm], strict=True)]

        factor = None if found.get("factor") is None else float(found["factor"])
        return VectorSetting(str(found["fault"]), str(found["detail"]), rows), factor

    @property
    def facts(self) -> dict[str, Any]:
        """Facts of the reference for a report."""
        return {
            "adapter": self.adapter_name,
            "base_model": self.base_name,
            "sensitivity": self.sensitivity,
            "bias": self.formats["bf16"]["strength"],
            "prompts": len(self.questions),
            "new_tokens": 0,
            "device": self.device,
        }

    @cached_property
    def numbers(self) -> int:
        """Number of components of a vector; 0 where rows differ."""
        return self._lengths[0] if len({*self._lengths}) == 1 else 0

    @cached_property
    def unit(self) -> float:
        """Number by which answers are divided."""
        right = chain.from_iterable(self.answer(row) for arm in (BASE, ADAPTER) for row in self.rows[arm])
        return math.sqrt(math.fsum(value * value for value in right) / (2 * sum(self._lengths))) / SIZE

    @property
    def right(self) -> VectorSetting:
        """The way in which a right server computes."""
        return VectorSetting("", "", lambda arm: list(self.rows[arm]))

    def settings(self) -> list[VectorSetting]:
        """Ways of computing both models that differ from the right way."""
        found = [setting for setting, _ in self._settings]
        if self.task == "embed":
            name, detail = (
                (RAW, "vectors come as they are pooled, and not with the length 1")
                if self.is_normalised
                else (FLIPPED, "vectors come with the length 1, and not as they are pooled")
            )
            found.append(VectorSetting(name, detail, self.right.rows, is_flipped=True))
        return found

    def variants(self) -> list[tuple[VectorSetting, float | None]]:
        """Faults of the adapter alone, with their factor on every delta_W if they are one."""
        return list(self._variants)

    def answer(self, row: Vector, setting: VectorSetting | None = None) -> list[float]:
        """Answer that a server should give for a computed row: a vector, or logits without their mean."""
        if self.task != "embed":
            found = self.centred(row)
            return [found[place] for place in setting.order] if setting is not None and setting.order else found
        setting = setting or self.right
        row = row if setting.dimensions is None else row[: setting.dimensions]
        length = math.sqrt(math.fsum(value * value for value in row)) or 1.0
        return [value / length for value in row] if self.is_normalised != setting.is_flipped else list(row)

    def centred(self, logits: Vector) -> list[float]:
        """Logits without the mean over the classes of each token, which softmax does not show."""
        if self.activation != "softmax":
            return list(logits)
        classes = len(self.labels)
        groups = (logits[at : at + classes] for at in range(0, len(logits), classes))
        return [value - math.fsum(group) / classes for group in groups for value in group]

    def from_probabilities(self, row: Vector) -> list[float] | None:
        """Logits without their mean, from the output of softmax or sigmoid; None if these are not probabilities."""
        if self.activation is None or not all(0 <= value <= 1 for value in row):
            return None
        told = [max(value, LEAST) for value in row]
        if self.activation == "sigmoid":
            return [math.log(value) - math.log1p(-min(value, SURELY)) for value in told]
        classes = len(self.labels)
        if any(abs(math.fsum(row[at : at + classes]) - 1) > SUM for at in range(0, len(row), classes)):
            return None
        return self.centred([math.log(value) for value in told])

    def is_sure(self, probabilities: Vector) -> bool:
        """Whether a probability is so near to 0, or that of a sigmoid so near to 1, that its logit is lost."""
        most = SURELY if self.activation == "sigmoid" else 1.0
        return any(value < LEAST or value > most for value in probabilities)

    @cached_property
    def known_settings(self) -> list[VectorSetting]:
        """The settings that were recorded, and the other length of vectors."""
        return self.settings()

    def models(self, setting: VectorSetting | None = None) -> VectorModels:
        """The models of the judge, as a server computes them in a setting."""
        setting = setting or self.right
        name = (setting.fault, setting.detail)
        if name not in self._models:
            self._models[name] = VectorModels(self, setting)
        return self._models[name]

    def far(self, setting: VectorSetting, arm: str) -> list[float]:
        """Mean squares by which a setting moves the right answers of an arm, text by text, in the judge's units."""
        name = (setting.fault, setting.detail, arm)
        if name not in self._far:
            moved, right = (getattr(self.models(each), arm).rows for each in (setting, None))
            pairs = zip(moved, right, strict=False)
            self._far[name] = [math.fsum((a[i] - b[i]) ** 2 for i in a) / len(a) for a, b in pairs]
        return self._far[name]

    def most_requests(self, repeats: int) -> int:
        """Largest number of requests of a check."""
        return (3 + repeats) * len(self.questions) + MORE_REQUESTS


MORE_REQUESTS = 16
"""Largest number of requests that find the server's form and names, and compare numbers with their base64."""


@final
class VectorModels(Models):
    """Right and faulty models, whose rows have a number for each component of an answer, not for each token.

    Args:
        reference: The reference.
        setting: The way in which the server computes; faults of the adapter are known only for the right way.
    """

    def __init__(self, reference: VectorReference, setting: VectorSetting) -> None:
        self._reference, self._setting = reference, setting
        self.base, self.adapter = (self._model(setting, arm) for arm in (BASE, ADAPTER))
        self.questions = [Question((), ()) for _ in reference.questions]
        self.places = [(index, 0) for index in range(len(self.base.rows))]
        self.sensitivity, self.vocabulary, self.ends = reference.sensitivity, 0, frozenset[int]()
        self._faults = [] if setting.fault else reference.variants()

    def row(self, answer: Vector) -> dict[int, float]:
        """Row of the judge for a server's answer."""
        return {index: value / self._reference.unit for index, value in enumerate(answer)}

    def _model(self, setting: VectorSetting, arm: str, factor: float | None = None) -> Model:
        rows = [self.row(self._reference.answer(row, self._setting)) for row in setting.rows(arm)]
        return Model(rows, [0.0] * len(rows), setting.fault, setting.detail, factor)

    @cached_property
    def _scaled(self) -> list[tuple[float, Model]]:
        known = [
            (factor, self._model(setting, ADAPTER, factor)) for setting, factor in self._faults if factor is not None
        ]
        return sorted([(0.0, self.base), (1.0, self.adapter), *known], key=lambda pair: pair[0])

    @property
    def factors(self) -> Sequence[float]:  # type: ignore[override]
        return [factor for factor, _ in self._scaled if factor]

    def text(self, place: int) -> str | None:
        return self._reference.questions[place].text

    def rounding(self, number_format: str) -> float:
        return SIZE * self._reference.formats[number_format]["distance"]

    def bias(self, number_format: str) -> float:
        return self._reference.formats[number_format]["strength"]

    def sensitivity_in(self, number_formats: Sequence[str]) -> float:
        known = self._reference.sensitivities
        return max([self.sensitivity, *(known[name] for name in number_formats)])

    def scaled(self, factor: float, questions: int | None = None) -> Model:
        return between(self._scaled, factor)

    def adapter_faults(self) -> Iterable[FaultyModel]:
        for setting, factor in self._faults:
            if factor is None:
                yield FaultyModel(setting.fault, setting.detail, partial(self._run, setting))

    def _run(self, setting: VectorSetting, questions: int | None) -> Model:
        return self._model(setting, ADAPTER)

    def base_faults(self) -> Iterable[FaultyModel]:
        return ()

    def with_coarse_caches(self) -> Iterable[Model]:
        return ()


def _question(found: Mapping[str, Any], *, is_pair: bool) -> VectorQuestion:
    text, pair, tokens = (found[name] for name in VectorQuestion._fields)
    if not isinstance(text, str) or not isinstance(pair, str | None) or type(tokens) is not int:
        raise ValueError("a question has no text, or no number of tokens")
    if (pair is not None) != is_pair:
        raise ValueError("a score needs pairs of texts, and anything else single ones")
    return VectorQuestion(text, pair, tokens)


def floats_of(encoded: str) -> list[float]:
    """Finite numbers of a text in base64 that holds them in float32, the lowest byte first.

    Raises:
        ValueError: Another text, or a number that is not finite.
    """
    numbers = array("f", base64.b64decode(encoded, validate=True))
    if sys.byteorder == "big":
        numbers.byteswap()
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a number is not finite")
    return numbers.tolist()


def _rows(encoded: Any, lengths: Sequence[int]) -> list[Vector]:
    numbers = floats_of(encoded)
    if len(numbers) != sum(lengths):
        raise ValueError(f"{len(numbers)} numbers, expected {sum(lengths)}")
    return _split(numbers, lengths)


def _differences(found: Mapping[str, Any], lengths: Sequence[int]) -> list[Vector]:
    """Differences of a fault: a scale for each row, and for each component an integer that counts 127ths of it."""
    scales = floats_of(found["scales"])
    levels = array("b", base64.b64decode(found["levels"], validate=True))
    if (len(scales), len(levels)) != (len(lengths), sum(lengths)):
        raise ValueError("the numbers of a fault do not fit the rows")
    rows = zip(scales, _split(levels, lengths), strict=True)
    return [[scale * level / LEVELS for level in row] for scale, row in rows]


def _split(numbers: Sequence[float], lengths: Sequence[int]) -> list[Vector]:
    found, at = list[Vector](), 0
    for length in lengths:
        found.append(numbers[at : at + length])
        at += length
    return found


def read_any_reference(path: Path) -> Reference | VectorReference:
    """Read a reference of either kind.

    Args:
        path: Its file.

    Raises:
        CheckpointError: Not a reference of this version.
    """

    def make(content: Any) -> Reference | VectorReference:
        return VectorReference(content) if cast(Any, content).get("kind") == KIND else Reference(content)

    return read_as(path, make)
