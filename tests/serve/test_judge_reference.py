"""The judge's verdicts on recorded models: planted faults, a server with one model, and what noise may hide."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from loraover.reporting.html_page import clauses
from loraover_serve.engines import engine_class
from loraover_serve.judge.evidence import Evidence
from loraover_serve.judge.limits import ADAPTER
from loraover_serve.judge.models import Answers, Greedy, Model, Rows
from loraover_serve.judge.names import LAYERS, OTHER_BASE, SCALED
from loraover_serve.judge.reference import Reference, read_reference
from loraover_serve.judge.rules import judge

from support.verified import FAULTS, Case, plant, save_base

TOP = 20
Told = tuple[str, str | None]
"""A verdict and the name of a fault."""

HIDDEN_BY_ONE_MODEL = ("a tenth more", "permutation dropped", "int8", "bf16")
"""Faults that move answers less than a coarse base model would, of which a server with one model has no answers."""


def as_a_server(answers: Answers, asked: Case, reference: Reference) -> Answers:
    """The answers of an engine, as a server gives them: the likeliest tokens at the places of a reference."""
    places = {at: place for place, at in enumerate(reference.places)}

    def likeliest(rows: Rows) -> Rows:
        found = {}
        for place, row in rows.items():
            if (at := places.get(asked.models.places[place])) is not None:
                found[at] = dict(sorted(row.items(), key=lambda pair: -pair[1])[:TOP])
        return found

    greedy = [Greedy(each.question, each.tokens, each.length, {}) for each in answers.greedy]
    return Answers(likeliest(answers.base), likeliest(answers.adapter), greedy)


@pytest.mark.parametrize("name", [*FAULTS, "right", "another base model"])
def test_an_engine_has_verifys_verdict(name: str, asked: Case, reference: Reference, tmp_path: Path) -> None:
    """`test_verify.py` expects the same of PyTorch's models; a server may also have one model under both names."""
    changed: dict[str, Path] = {}
    expected: Told = ("differs", OTHER_BASE)
    if name in FAULTS:
        changed["adapter"] = plant(FAULTS[name], asked.adapter, tmp_path / "wrong")
        expected = ("differs", FAULTS[name].fault)
    elif name == "right":
        expected = ("as trained", None)
    else:
        changed["base"] = save_base(tmp_path / "other", seed=7)
    with engine_class("torch").start(asked.setting(tmp_path, **changed)) as engine:
        answers = as_a_server(engine.answers(asked.models), asked, reference)
    found = judge(Evidence(reference, answers))
    assert (found["verdict"], found["fault"]) == expected, found["reason"]
    assert name not in FAULTS or FAULTS[name].words in found["reason"]
    alone = judge(Evidence(reference, replace(answers, base={}, is_one_model=True)))
    for reason in (found["reason"], alone["reason"]):
        assert clauses(reason) == [reason], "a verdict is one sentence"
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
    scaled = reference.scaled(0.7)
    like = [
        {i: value + draw.uniform(0.7, 1.3) * (row[i] - value) for i, value in right.items()}
        for right, row in zip(reference.adapter.rows, scaled.rows, strict=False)
    ]
    reference.variants[ADAPTER].append(Model(like, reference.adapter.floors, LAYERS, "a layer is missing"))
    one, other = (
        {place: {i: value + draw.gauss(0, 0.006) for i, value in row.items()} for place, row in enumerate(model.rows)}
        for model in (reference.base, scaled)
    )
    found = judge(Evidence(reference, Answers(one, other)), "int4")
    assert re.match(rf"{SCALED}: every delta_W is multiplied by 0\.(69|7)", found["reason"])
    assert "other faults that would give the same answers: a layer is missing" in "; ".join(found["not_checked"])


@pytest.mark.parametrize(
    ("factor", "formats", "expected"),
    [(1, 0.5, ("as trained", None)), (2, 0.5, ("differs", SCALED)), (2, 4, ("differs", None))],
)
def test_one_model_may_be_as_far_off_as_the_coarsest_format(
    factor: float, formats: float, expected: Told, reference: Reference
) -> None:
    """No answers of the base model say how large the noise is; what is left beside a fault may be as large."""
    draw, noise = Random(0), formats * max(float(each["distance"]) for each in reference.formats.values())
    rows = {
        place: {i: value + draw.gauss(0, noise) for i, value in row.items()}
        for place, row in enumerate(reference.scaled(factor).rows)
    }
    found = judge(Evidence(reference, Answers({}, rows, is_one_model=True)), "int4")
    assert (found["verdict"], found["fault"]) == expected, found["reason"]
