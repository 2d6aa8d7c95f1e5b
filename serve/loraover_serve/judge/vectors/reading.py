"""Answers of a server in the units of a reference, and the way to compute them that explains them best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from loraover_serve.judge.case import Case, share_along, strength_along
from loraover_serve.judge.estimates import IN_FILES, Interval
from loraover_serve.judge.evidence import Evidence
from loraover_serve.judge.limits import ADAPTER, BASE, EXPLAINED, FLOOR
from loraover_serve.judge.models import Answers, AskedOnce
from loraover_serve.judge.names import LABELS
from loraover_serve.judge.results import Suspect
from loraover_serve.judge.vectors.asking import VectorAnswers
from loraover_serve.judge.vectors.reference import SIZE, Vector, VectorReference, VectorSetting

LIKE = 0.25
"""Largest deviation from 1 of the strength along the way to another setting, if this setting explains the answers."""


@dataclass(frozen=True)
class VectorFindings:
    """Measurements of a check of vectors; distances are RMS differences, relative to the RMS size of a right answer."""

    __pydantic_config__ = IN_FILES

    path: str
    """Path at which the server answered"""
    task: str
    """The task: embed, classify, score or token_classify"""
    numbers: int | None
    """Number of components of each answer; None if answers have different numbers"""
    noise: float | None
    """Distance of the base model's answers from PyTorch's; None if the server has one model under both names"""
    off: float | None
    """Distance of the adapter's answers from PyTorch's; None if they cannot be compared"""
    effect: float
    """Distance between answers with and without the adapter in PyTorch"""
    setting: str | None = None
    """Another way to compute both models that explains the answers, in words; None if they are computed as recorded"""
    nearest: tuple[str, ...] = ()
    """Faults of the adapter that were compared, in words, with their distances from the answers, the nearest first"""


class AnswerReader:
    """Reader of answers in the form of the reference: vectors, or logits, which may come as probabilities.

    Attributes:
        found: First answers of each arm, alone, by the index of the text.
        size: Number of components of every answer; None if they have different numbers.
        sizes: Number of components of each answer, of any round or beside others, and of the recorded one.
        wrong_sizes: Those that differ.
    """

    def __init__(self, reference: VectorReference, answers: VectorAnswers) -> None:
        self.reference, self.answers = reference, answers
        raw = {BASE: answers.base, ADAPTER: answers.adapter}
        self.found = {arm: {place: said.numbers for place, said in each.items()} for arm, each in raw.items()}
        self._every = [(arm, place, said.numbers) for arm, place, said in answers.every()]
        self.sizes = [(len(row), len(reference.rows[arm][place])) for arm, place, row in self._every]
        self.wrong_sizes = [pair for pair in self.sizes if pair[0] != pair[1]]
        different = {size for size, _ in self.sizes}
        self.size = different.pop() if len(different) == 1 else None

    @property
    def hides_logits(self) -> bool:
        """Whether the answers are probabilities, and some are so near to 0 or 1 that their logits are lost."""
        rows = [row for _, _, row in self._every]
        are_probabilities = all(self.reference.from_probabilities(row) is not None for row in rows)
        return are_probabilities and any(map(self.reference.is_sure, rows))

    @cached_property
    def read(self) -> Callable[[Vector], Vector]:
        """The reading of answers, as they are or as probabilities, that is nearest to the right answers."""
        if any(self.reference.from_probabilities(row) is None for _, _, row in self._every):
            return self.reference.centred
        ways: list[Callable[[Vector], Vector]] = [self.reference.centred, self._from_probabilities]
        return min(ways, key=self._distance)

    def _from_probabilities(self, row: Vector) -> Vector:
        found = self.reference.from_probabilities(row)
        return self.reference.centred(row) if found is None else found

    def _distance(self, way: Callable[[Vector], Vector]) -> float:
        right = {arm: [self.reference.answer(row) for row in rows] for arm, rows in self.reference.rows.items()}
        return math.fsum(
            min(math.dist(way(row), right[either][place]) for either in right)
            for arm in self.found.values()
            for place, row in arm.items()
        )

    @cached_property
    def rows(self) -> dict[str, dict[int, Vector]]:
        """Answers of each arm in the units of the model."""
        return {arm: {place: self.read(row) for place, row in rows.items()} for arm, rows in self.found.items()}

    def evidence(self, setting: VectorSetting) -> Evidence:
        """The answers, and the models as a server computes them in a setting."""
        models = self.reference.models(setting)
        known = range(len(models.places))
        base, adapter = (
            {place: models.row(row) for place, row in self.rows[arm].items() if place in known}
            for arm in (BASE, ADAPTER)
        )
        rounds = [
            AskedOnce(
                {p: models.row(self.read(said.numbers)) for p, (said, _) in one.items() if p in known},
                {p: told for p, (_, told) in one.items()},
            )
            for one in self.answers.rounds
            if not self.answers.is_here
        ]
        mixed = {
            arm: {place: models.row(self.read(said.numbers)) for place, said in found.items() if place in known}
            for arm, found in self.answers.mixed.items()
        }
        one = self.answers.is_one_model
        return Evidence(models, Answers(base, adapter, mixed=mixed, rounds=rounds, is_one_model=one))

    def findings(
        self,
        case: Case | None,
        setting: tuple[VectorSetting, Case] | None = None,
        nearest: Sequence[Suspect] = (),
    ) -> VectorFindings:
        """Measurements of the check."""
        models = self.reference.models()
        pairs = zip(models.base.rows, models.adapter.rows, strict=True)
        effect = math.sqrt(fmean(fmean((one[i] - other[i]) ** 2 for i in one) for one, other in pairs))
        is_noise_known = case is not None and not self.answers.is_one_model and self.found[BASE]
        return VectorFindings(
            self.answers.path,
            self.reference.task,
            self.size,
            case.noise.rms / SIZE if case is not None and is_noise_known else None,
            None if case is None else case.found.rms / SIZE,
            effect / SIZE,
            None if setting is None else setting[0].detail,
            tuple(f"{each.fault} ({each.detail}): {each.rms / SIZE:.2g}" for each in nearest),
        )


def find_setting(read: AnswerReader, case: Case) -> tuple[VectorSetting, Case] | None:
    """The other way to compute both models that explains the answers best, with the answers compared with its models.

    If the server has a base model, the way must explain most of the distance of its answers from the right ones. If it
    has a single model, the adapter's answers decide.
    """
    if case.noise.rms <= FLOOR:
        return None
    found: list[tuple[float, VectorSetting, Case]] = []
    squares = (
        [each.square for each in case.off]
        if case.is_one_model
        else [each.square for each in case.evidence.off(BASE, case.evidence.base)]
    )
    arm = ADAPTER if case.is_one_model else BASE
    for setting in [*read.reference.known_settings, *_orders(read)]:
        far = read.reference.far(setting, arm)
        near = math.sqrt(fmean(squares[: len(far)]))
        if math.sqrt(fmean(far)) >= 2 * near:  # so the answers are nearer to the right ones
            continue
        other = Case(read.evidence(setting), case.served_format, case.option)
        model, start = (other.evidence.base, case.evidence.base)
        changes = case.evidence.base_changes(model)
        if case.is_one_model:
            model, start = other.evidence.adapter, case.evidence.adapter
            changes = case.evidence.changes(model, start)
        way = strength_along(changes)
        explained = share_along(changes, way)
        is_likely = abs(way.value - 1) <= LIKE and explained >= EXPLAINED and is_clear(way)
        if is_likely and other.noise.rms < near:
            found.append((other.noise.rms, setting, other))
    if not found:
        return None
    _, setting, other = min(found, key=lambda each: each[0])
    return setting, other


def is_clear(way: Interval) -> bool:
    """Whether the interval excludes 0; a single text has no interval."""
    return way.low > 0


def _orders(read: AnswerReader) -> list[VectorSetting]:
    """The order of classes in which the answers are nearest to the right ones, if it is not the right order."""
    reference, arm = read.reference, ADAPTER if read.answers.is_one_model else BASE
    if reference.task != "classify":
        return []
    right = {place: reference.answer(reference.rows[arm][place]) for place in read.rows[arm]}

    def apart(mine: int, theirs: int) -> float:
        return math.fsum((row[mine] - right[place][theirs]) ** 2 for place, row in read.rows[arm].items())

    classes = range(len(reference.labels))
    order = [min(classes, key=lambda theirs: apart(mine, theirs)) for mine in classes]
    if order == [*classes] or sorted(order) != [*classes]:
        return []
    shown = ", ".join(reference.labels[place] for place in order)
    return [VectorSetting(LABELS, f"the classes come in the order {shown:.200}", reference.right.rows, order=order)]
