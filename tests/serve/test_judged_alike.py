"""Verify and the checker of the standard library judge the same answers alike: one verdict, and one name of a fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from loraover_serve.comparison.rounding import FORMATS
from loraover_serve.engines import engine_class
from loraover_serve.engines.answers import ADAPTER, GreedyAnswer, Question, Row
from loraover_serve.judge.names import ENDS_EARLY, IN_BASE, LAYERS, NOT_APPLIED, OTHER_BASE, SCALED
from loraover_serve.judge.rules import judge
from loraover_serve.record.adapter_check.evidence import Greedy, RecordedEvidence, ServerAnswers
from loraover_serve.record.adapter_check.reference import UNIT, Model, Reference, read_reference
from loraover_serve.record.recorder import KEPT, TOP
from loraover_serve.verify.evidence import Answers as VerifyAnswers
from loraover_serve.verify.run import ask

from support.recorded import asked_alike, record
from support.verified import FAULTS, WRONG_PREFIX, Planted, plant, save_base
from support.verified import Case as VerifyCase


def as_recorded(answers: VerifyAnswers, asked: VerifyCase, reference: Reference) -> ServerAnswers:
    """The same answers as a server gives them: the likeliest tokens at the places of the reference."""
    questions = asked.judge.reference.questions
    places = {(q, questions[q].answered[step]): place for place, (q, step) in enumerate(reference.places)}
    arms = [
        {places[at]: likeliest(row) for row in rows if (at := (row.question, row.position)) in places}
        for rows in (answers.base, answers.adapter)
    ]
    return ServerAnswers(
        arms[0], arms[1], [Greedy(q, answer.tokens, answer.length, {}) for q, answer in enumerate(answers.greedy)]
    )


def likeliest(row: Row) -> dict[int, float]:
    return {int(i): float(row.logprobs[i]) for i in np.argsort(-row.logprobs)[:TOP]}


def answers_of(asked: VerifyCase, tmp_path: Path, **changed: Path) -> VerifyAnswers:
    """What PyTorch answers with another adapter or base model."""
    with engine_class("torch").start(asked.setting(tmp_path, **changed)) as engine:
        return ask(engine, asked.judge.reference)


Told = tuple[str, str | None]
"""A verdict and the name of a fault."""


def both_ways(answers: VerifyAnswers, asked: VerifyCase, reference: Reference, served: str = "bf16") -> list[Told]:
    """What verify says of answers, and what the checker says of the same ones."""
    one = replace(asked.judge, number_format=served).judge("an engine", None, answers, 1.0)
    other = judge(RecordedEvidence(reference, as_recorded(answers, asked, reference)), served)
    return [(one.verdict, one.fault), (other["verdict"], other["fault"])]


HIDDEN_BY_ONE_MODEL = ("a tenth more", "permutation dropped", "int8", "bf16")
"""Faults that move answers less than a coarse base model would, of which a server with one model has no answers."""


@pytest.mark.parametrize("name", [*FAULTS, "right", "another base model"])
def test_an_engine_has_verifys_verdict(name: str, asked: VerifyCase, reference: Reference, tmp_path: Path) -> None:
    """`test_verify.py` expects the same of verify; a server may also have one model under both names."""
    changed: dict[str, Path] = {}
    expected: Told = ("differs", OTHER_BASE)
    if name in FAULTS:
        changed["adapter"] = plant(FAULTS[name], asked.adapter, tmp_path / "wrong")
        expected = ("differs", FAULTS[name].fault)
    elif name == "right":
        expected = ("as trained", None)
    else:
        changed["base"] = save_base(tmp_path / "other", seed=7)
    answers = as_recorded(answers_of(asked, tmp_path, **changed), asked, reference)
    found = judge(RecordedEvidence(reference, answers))
    assert (found["verdict"], found["fault"]) == expected, found["reason"]
    assert name not in FAULTS or FAULTS[name].words in found["reason"]
    alone = judge(RecordedEvidence(reference, replace(answers, base={}, is_one_model=True)))
    if name == "another base model":
        assert (alone["verdict"], alone["fault"]) == ("differs", None)
        assert "one model under both names, which may be another base model" in alone["reason"]
    elif name in HIDDEN_BY_ONE_MODEL:
        assert alone["verdict"] in ("as trained", "inconclusive")
    else:
        assert (alone["verdict"], alone["fault"]) == expected, alone["reason"]


def test_a_scaling_is_named_before_a_fault_that_noise_lets_through(recorded: Path) -> None:
    """A recorded fault that is like 0.7 times the adapter, and that noise alone would not exclude."""
    reference, draw = read_reference(recorded), Random(0)
    right, base = (dict(enumerate(model.rows)) for model in (reference.adapter, reference.base))
    scaled = RecordedEvidence(reference, ServerAnswers(base, right)).scaled(0.7)
    like = [
        {i: value + draw.uniform(0.7, 1.3) * (row[i] - value) for i, value in right[place].items()}
        for place, row in enumerate(scaled.rows)
    ]
    reference.variants[ADAPTER].append(Model(like, reference.adapter.floors, LAYERS, "a layer is missing"))
    one, other = (
        {place: {i: value + draw.gauss(0, 0.006) for i, value in row.items()} for place, row in enumerate(model.rows)}
        for model in (reference.base, scaled)
    )
    found = judge(RecordedEvidence(reference, ServerAnswers(one, other)), "int4")
    assert re.match(rf"{SCALED}: every delta_W is multiplied by 0\.(69|7)", found["reason"])
    assert "within noise it could also be: a layer is missing" in found["reason"]


@pytest.mark.parametrize(
    ("factor", "formats", "expected"),
    [(1, 0.5, ("as trained", None)), (2, 0.5, ("differs", SCALED)), (2, 4, ("differs", None))],
)
def test_one_model_may_be_as_far_off_as_the_coarsest_format(
    factor: float, formats: float, expected: Told, recorded: Path
) -> None:
    """No answers of the base model say how large the noise is; what is left beside a fault may be as large."""
    reference, draw = read_reference(recorded), Random(0)
    noise = formats * max(float(each["distance"]) for each in reference.formats.values())
    served = RecordedEvidence(reference, ServerAnswers({}, dict(enumerate(reference.adapter.rows)), is_one_model=True))
    rows = {
        place: {i: value + draw.gauss(0, noise) for i, value in row.items()}
        for place, row in enumerate(served.scaled(factor).rows)
    }
    found = judge(RecordedEvidence(reference, ServerAnswers({}, rows, is_one_model=True)), "int4")
    assert (found["verdict"], found["fault"]) == expected, found["reason"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("is_right", [True, False])
def test_a_coarse_base_model_has_one_verdict(
    name: str, is_right: bool, asked: VerifyCase, reference: Reference, tmp_path: Path
) -> None:
    coarse = save_base(tmp_path / "coarse", change=FORMATS[name].weights)
    adapter = asked.adapter if is_right else plant(FAULTS["rsLoRA ignored"], asked.adapter, tmp_path / "wrong")
    one, other = both_ways(answers_of(asked, tmp_path, base=coarse, adapter=adapter), asked, reference)
    assert one == other
    assert (one[0] == "differs") == (not is_right)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_wrong_prefix_has_one_verdict(asked: VerifyCase, reference: Reference, tmp_path: Path) -> None:
    wrong = plant(WRONG_PREFIX, asked.adapter, tmp_path / "wrong")
    found = both_ways(answers_of(asked, tmp_path, adapter=wrong), asked, reference)
    assert found == [("differs", NOT_APPLIED)] * 2


def unlikely(answers: VerifyAnswers, asked: VerifyCase) -> VerifyAnswers:
    """The adapter's logprobs belong to other tokens."""
    return replace(answers, adapter=[replace(row, logprobs=np.roll(row.logprobs, 1)) for row in answers.adapter])


def generating(tokens: Callable[[Question], tuple[int, ...]]) -> Callable[[VerifyAnswers, VerifyCase], VerifyAnswers]:
    """Greedy answers are others."""

    def change(answers: VerifyAnswers, asked: VerifyCase) -> VerifyAnswers:
        found = map(tokens, asked.judge.reference.questions)
        return replace(answers, greedy=[GreedyAnswer(each, len(each)) for each in found])

    return change


CHANGES: dict[str, tuple[Callable[[VerifyAnswers, VerifyCase], VerifyAnswers], Told]] = {
    "adapter in base": (lambda answers, asked: replace(answers, base=answers.adapter), ("differs", IN_BASE)),
    "other tokens": (generating(lambda question: (0,)), ("differs", None)),
    "first tokens": (generating(lambda question: question.continuation[:1]), ("differs", ENDS_EARLY)),
    "no tokens": (generating(lambda question: ()), ("as trained", None)),
    "another vocabulary": (unlikely, ("differs", None)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_answers_have_one_verdict(name: str, asked: VerifyCase, reference: Reference, tmp_path: Path) -> None:
    change, expected = CHANGES[name]
    found = both_ways(change(answers_of(asked, tmp_path), asked), asked, reference)
    assert found == [expected] * 2


@pytest.mark.parametrize(
    ("factor", "served", "verdict"),
    [(1e-6, "bf16", "inconclusive"), (0.03, "bf16", "inconclusive"), (0.03, "int4", "as trained")],
)
def test_a_weak_adapter_in_int4_has_one_verdict(
    factor: float, served: str, verdict: str, asked: VerifyCase, tmp_path: Path
) -> None:
    weaker = Planted("", "", {}, lambda found: {k: factor * t if "lora_B" in k else t for k, t in found.items()})
    weak = plant(weaker, asked.adapter, tmp_path / "weak")
    coarse = save_base(tmp_path / "coarse", change=FORMATS["int4"].weights)
    recorded = record(asked.base, weak, tmp_path)
    mine = asked_alike(asked.base, weak, recorded)
    answers = answers_of(mine, tmp_path, base=coarse)
    assert both_ways(answers, mine, read_reference(recorded), served) == [(verdict, None)] * 2


def row_of(place: tuple[int, int], row: dict[int, float], kept: set[int]) -> Row:
    """A row as verify has it, of these tokens."""
    ids = [i for i in row if i in kept]
    return Row(*place, np.array([row[i] for i in ids], np.float32), np.array(ids))


def test_both_sides_measure_the_same_changes(asked: VerifyCase, reference: Reference, tmp_path: Path) -> None:
    """Recorded logprobs are rounded: each number is off by what a direction that is off by UNIT makes of it."""
    wrong = plant(FAULTS["rsLoRA ignored"], asked.adapter, tmp_path / "wrong")
    recorded = as_recorded(answers_of(asked, tmp_path, adapter=wrong), asked, reference)
    places = [(q, asked.judge.reference.questions[q].answered[step]) for q, step in reference.places]
    arms = (recorded.base, recorded.adapter)
    rows = [[row_of(places[p], row, {*row}) for p, row in arm.items()] for arm in arms]
    sides = (RecordedEvidence(reference, recorded), asked.judge.evidence(VerifyAnswers(rows[0], rows[1], ())))
    known = [[row_of(places[p], row, {*reference.base.rows[p]}) for p, row in arm.items()] for arm in arms]
    alike = (sides[0], asked.judge.evidence(VerifyAnswers(known[0], known[1], ())))
    for one, other in zip(*(side.changes(side.adapter, side.base) for side in alike), strict=True):
        assert (one.prompt, one.tokens) == (other.prompt, other.tokens)
        off = UNIT * one.tokens**0.5
        assert abs(one.along - other.along) <= 1.5 * off * one.total**0.5
        assert one.total == pytest.approx(other.total, rel=1e-6)
        for part in ("size", "rest"):
            assert abs(getattr(one, part) ** 0.5 - getattr(other, part) ** 0.5) <= 1.5 * off
    for one_off, other_off in zip(*(side.off(ADAPTER, side.adapter) for side in sides), strict=True):
        assert one_off.square**0.5 <= other_off.square**0.5 + 1.5 * UNIT, "an unrecorded token counts at its least"
        assert one_off.square >= 0.8 * KEPT / TOP * other_off.square
