"""Sentences of verdicts, and lists of what was not checked: they say what the answers show, and no more."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from loraover.client.speaker import Response
from loraover_serve.judge import names
from loraover_serve.judge.case import Case
from loraover_serve.judge.churn import Meanwhile, judge_churn
from loraover_serve.judge.estimates import Interval, in_percent, share_in_percent
from loraover_serve.judge.evidence import Change, Evidence, projected
from loraover_serve.judge.limits import ADAPTER, BASE, EXACT_STRENGTH
from loraover_serve.judge.models import Answers, AskedOnce, Model, Rows
from loraover_serve.judge.names import CROSSED
from loraover_serve.judge.owners import Said
from loraover_serve.judge.reference import Reference
from loraover_serve.judge.remedies import REMEDIES
from loraover_serve.judge.results import Churn, Off
from loraover_serve.judge.rules import judge, too_far
from loraover_serve.judge.warm_probe import Asked

from support.drawn_reference import drawn_reference
from support.long_questions import LongCase

ALLOWED = (1 - EXACT_STRENGTH, 1 + EXACT_STRENGTH)


IN_THE_SENTENCE = {names.LEAKS, names.CHANGED, names.CHANGED_BY_OTHER, names.CUT}
"""Faults whose sentence says what to do."""


def rows_of(model: Model, noise: Callable[[int], float] = lambda place: 0.0) -> Rows:
    draw = Random(0)
    return {p: {i: v + draw.gauss(0, noise(p)) for i, v in row.items()} for p, row in enumerate(model.rows)}


def once(rows: Rows) -> AskedOnce:
    return AskedOnce(rows, {place: {} for place in rows})


@pytest.mark.parametrize("value", [0.9975, 0.99795, 1.0021, 0.5])
def test_a_strength_is_not_shown_as_a_right_one_if_it_is_none(value: float) -> None:
    words = Interval.around(value, 1e-5).beside(ALLOWED)
    (low, high), (least, most) = (map(float, each) for each in re.findall(r"([\d.]+) to ([\d.]+) %", words))
    assert high < least or low > most, words


def test_percents_have_the_digits_that_they_need() -> None:
    assert Interval.around(1.0, 0.001).beside(ALLOWED).endswith("(99.9 to 100.1 %), where 99.8 to 100.2 % is right")
    assert (in_percent(-1e-5), in_percent(0.5, 1)) == ("0 %", "50 to 100 %")
    assert (share_in_percent(4.2e-4), share_in_percent(0.996)) == ("0.042 %", "99.6 %")


@pytest.mark.parametrize(("lacking", "listed"), [(0, False), (1, True), (2, True)])
def test_a_quick_check_tells_the_answers_without_the_adapter(lacking: int, listed: bool, reference: Reference) -> None:
    first = [reference.first(question) for question in range(len(reference.questions))]
    model, base = rows_of(reference.adapter), rows_of(reference.base)
    rows = {place: (base if at < lacking else model)[place] for at, place in enumerate(first)}
    found = judge(Evidence(reference, Answers({}, rows, rounds=[once(rows)])), is_quick=True)
    assert found["verdict"] == "as trained", found["reason"]
    assert found["reason"].startswith("the adapter is applied: ")
    unseen = [each for each in found["not_checked"] if f": {lacking} of " in each]
    assert bool(unseen) == listed, found["not_checked"]


def test_too_few_quick_answers_are_counted(reference: Reference) -> None:
    rows = {place: row for place, row in rows_of(reference.adapter).items() if place == 0}
    found = judge(Evidence(reference, Answers({}, rows, rounds=[once(rows)])), is_quick=True)
    assert (found["verdict"], found["reason"]) == (
        "inconclusive",
        "too few answers show whether the adapter is applied (1, and 3 are needed): check without --quick",
    )


def test_the_list_names_what_was_left_out(reference: Reference) -> None:
    rows, base = rows_of(reference.adapter), rows_of(reference.base)
    alone = judge(Evidence(reference, Answers({}, rows, is_one_model=True)))
    assert [each for each in alone["not_checked"] if "requests for both models at the same time" in each]
    mixed = {BASE: base, ADAPTER: rows}
    found = judge(Evidence(reference, Answers(base, rows, mixed=mixed)))
    assert "requests for two adapters at the same time: the server has no other adapter" in found["not_checked"]
    both = judge(Evidence(reference, Answers(base, rows, mixed=mixed | {"other": rows})))
    assert not [each for each in both["not_checked"] if "at the same time" in each]
    assert not [each for each in found["not_checked"] if "chat template" in each]


class OneFarPrompt:
    """Evidence of which one prompt is far off by both models, so that the root mean squares are nearly equal."""

    models, answers, adapter, base = (
        SimpleNamespace(sensitivity=1.0, sensitivity_in=lambda names: 1.0, rounding=lambda name: 1.0),
        SimpleNamespace(is_one_model=False),
        ADAPTER,
        BASE,
    )

    def changes(self, model: str, start: str) -> list[Change]:
        return [projected(0, [1.0], [1.0])]

    def off(self, arm: str, model: str) -> list[Off]:
        near = 4.0 if arm == ADAPTER else 1.0
        return [Off(prompt, (100.0 if prompt == 0 else near) ** 2, 100.0) for prompt in range(32)]


def test_a_distance_is_told_by_what_makes_it_certain() -> None:
    evidence: Any = OneFarPrompt()
    case = Case(evidence)
    assert case.is_further()
    assert too_far(case) == "its answers are 3.8 times as far from the right ones as noise explains"


@pytest.fixture
def churned(long_case: LongCase) -> Callable[..., Churn]:
    """Answers while nothing changes: so many of the adapter to each question, the last few by the base model."""
    long = long_case.caches
    rows = {BASE: rows_of(long.base), ADAPTER: rows_of(long.adapter)}
    cold = {arm: Asked(arm, "", each, None) for arm, each in rows.items()}

    def judged(arms: Mapping[str, str], times: int, wrong: int = 0, **more: Any) -> Churn:
        said = []
        for arm in arms:
            for at in range(times * len(long.questions)):
                question = at % len(long.questions)
                source = rows[BASE] if arm == ADAPTER and at < wrong else rows[arm]
                mine = {place: row for place, row in source.items() if long.places[place][0] == question}
                said.append(Said(arm, long.first(question), mine, 0.1, Response(arms[arm], question, {}, True)))
        begun = Churn("inconclusive", "", None, 3600.0, None, 1)
        return judge_churn(begun, long, arms, cold, cold[BASE], Meanwhile(said, {}, **more))

    return judged


def test_right_answers_in_churn_are_said_to_be_no_more(churned: Callable[..., Churn]) -> None:
    still = churned({ADAPTER: "shop"}, 30)
    assert still.verdict == "as trained", still.reason
    assert "came and went" not in still.reason, "nothing showed it"
    assert re.search(r"^all \d+ answers of shop were right", still.reason)
    moved = churned({ADAPTER: "shop", BASE: "base"}, 30, is_moved=True)
    assert re.search(r"^while adapters came and went, all \d+ answers of shop and base were right$", moved.reason)


def test_a_model_without_an_answer_is_told(churned: Callable[..., Churn]) -> None:
    found = churned({ADAPTER: "shop"}, 0, command_s=60.0, failures=["refused"])
    assert found.verdict == "inconclusive"
    assert "answers of shop: none came" in found.not_checked
    assert "the time after the command: the command ended after 60 of 3600 s" in found.not_checked
    assert "failed requests (1), such as: refused" in found.not_checked


def test_only_wrong_answers_are_listed_as_wrong(churned: Callable[..., Churn]) -> None:
    found = churned({ADAPTER: "shop", BASE: "base"}, 30, wrong=4)
    assert (found.verdict, found.fault) == ("differs", CROSSED), found.reason
    assert "4 of " in found.reason
    assert found.reason.endswith("answers of shop were wrong (4 of base)"), found.reason


def test_a_template_that_is_left_out_is_listed(reference: Reference) -> None:
    rows, base = rows_of(reference.adapter), rows_of(reference.base)
    for is_left_out in (True, False):
        answers = Answers(base, rows, without_template=is_left_out)
        found = judge(Evidence(reference, answers))["not_checked"]
        assert ("the chat template: the option --without-template leaves it out" in found) == is_left_out


def test_each_fault_has_a_remedy_on_its_line_or_in_its_sentence() -> None:
    others = {names.COARSE_CACHE, names.NOT_APPLIED_DETAIL}
    faults = {value for name, value in vars(names).items() if name.isupper() and isinstance(value, str)} - others
    assert faults == REMEDIES.keys() | IN_THE_SENTENCE
    assert not REMEDIES.keys() & IN_THE_SENTENCE
    assert all(0 < len(each) < 200 and ";" not in each for each in REMEDIES.values())


def test_a_coarse_server_is_told_to_record_its_weights() -> None:
    """Four bits that shrink the adapter in PyTorch hide how much of it a server applies."""
    reference, draw = drawn_reference(Random(1)), Random(0)
    reference.formats["int4"]["strength"] = 0.66
    base, adapter = (
        {place: {i: value + draw.gauss(0, 0.5) for i, value in row.items()} for place, row in enumerate(model.rows)}
        for model in (reference.base, reference.adapter)
    )
    found = judge(Evidence(reference, Answers(base, adapter)), "int4")
    assert found["verdict"] == "inconclusive", found["reason"]
    assert found["reason"].endswith(": record the adapter on the weights that the server has, with --base-weights")
