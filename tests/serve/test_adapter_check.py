"""The checker of the standard library beside verify: every planted fault, both ways, gets one verdict and one name."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve.test_verify_endpoint import Mixing

from loraover_serve.engines import engine_class
from loraover_serve.engines.answers import Row
from loraover_serve.engines.base import Engine
from loraover_serve.record.adapter_check.asker import Asker, served_names
from loraover_serve.record.adapter_check.case import Answers, Case, Greedy
from loraover_serve.record.adapter_check.command import check
from loraover_serve.record.adapter_check.reference import ARMS, Reference, read_reference
from loraover_serve.record.adapter_check.rules import finding
from loraover_serve.record.adapter_check.server import Server
from loraover_serve.verify.names import CHANGED, LEAKS, OTHER_BASE

from support.openai_server import openai_server
from support.planted_faults import FAULTS as PLANTED
from support.planted_faults import Ask, Fault, reply, right_models, save_sharp_base
from support.recorded import record
from support.verified import FAULTS, Served, make_case, plant, save_adapter, save_base
from support.verified import Case as VerifyCase

NAMES = ("base", "shop")
TOP = 20
SECONDS = 120.0


@pytest.fixture(scope="module")
def reference(recorded: Path) -> Reference:
    return read_reference(str(recorded))


def answers_of(engine: Engine, asked: VerifyCase, reference: Reference) -> Answers:
    """What a server would answer that gives the likeliest tokens of an engine."""
    questions = asked.judge.reference.questions
    places = {(q, questions[q].answered[step]): place for place, (q, step) in enumerate(reference.places)}
    arms = [
        {
            places[row.question, row.position]: likeliest(row)
            for row in engine.logprobs(arm, questions)
            if (row.question, row.position) in places
        }
        for arm in ARMS
    ]
    greedy = engine.generated(questions, max(len(question.continuation) for question in questions))
    return Answers(arms[0], arms[1], [Greedy(q, answer.tokens, answer.length, {}) for q, answer in enumerate(greedy)])


def likeliest(row: Row) -> dict[int, float]:
    return {int(i): float(row.logprobs[i]) for i in np.argsort(-row.logprobs)[:TOP]}


@pytest.mark.parametrize("name", [*FAULTS, "right", "another base model"])
def test_an_engine_has_verifys_verdict(name: str, asked: VerifyCase, reference: Reference, tmp_path: Path) -> None:
    """`test_verify.py` expects the same of verify."""
    changed: dict[str, Path] = {}
    expected: tuple[str, str | None] = ("differs", OTHER_BASE)
    if name in FAULTS:
        changed["adapter"] = plant(FAULTS[name], asked.adapter, tmp_path / "wrong")
        expected = ("differs", FAULTS[name].fault)
    elif name == "right":
        expected = ("as trained", None)
    else:
        changed["base"] = save_base(tmp_path / "other", seed=7)
    with engine_class("torch").start(asked.setting(tmp_path, **changed)) as engine:
        verdict, reason, fault = finding(Case(reference, answers_of(engine, asked, reference)))
    assert (verdict, fault) == expected, reason
    assert name not in FAULTS or FAULTS[name].words in reason


def checked(reply: Any, reference: Reference, models: Any = NAMES, **more: Any) -> dict[str, Any]:
    """The checker's result on a server that answers like this."""
    with openai_server(reply, models) as server:
        asked = Server(server.url, {}, time.monotonic() + SECONDS)
        names = served_names(asked, reference, "shop", None)
        return check(Asker(reference, asked, names), **more)


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Reference]:
    """A base model whose attention depends on positions, an adapter, and its reference."""
    folder = tmp_path_factory.mktemp("sharp")
    base = save_sharp_base(folder / "base")
    adapter = save_adapter(folder / "adapter", base)
    return base, adapter, read_reference(str(record(base, adapter, folder)))


@pytest.fixture(scope="module")
def serve(sharp: tuple[Path, Path, Reference], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Fault], Ask]:
    base, adapter, _ = sharp
    return right_models(make_case(base, adapter), tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", PLANTED)
def test_each_fault_of_a_server_has_verifys_verdict(
    name: str, sharp: tuple[Path, Path, Reference], serve: Callable[[Fault], Ask]
) -> None:
    """`test_verify_faults.py` expects the same of verify."""
    fault = PLANTED[name]
    found = checked(reply(fault.wrong(serve(fault))), sharp[2], fault.listed)
    assert (found["verdict"], found["fault"]) == (fault.verdict, fault.name), found["reason"]


@pytest.mark.parametrize(("victim", "fault"), [("base", LEAKS), ("shop", CHANGED)])
def test_answers_that_change_in_a_mixed_batch_are_named(
    victim: str, fault: str, asked: VerifyCase, reference: Reference
) -> None:
    found = checked(Mixing(Served(asked.base, {"base": None, "shop": asked.adapter}), victim), reference)
    assert (found["verdict"], found["fault"]) == ("differs", fault), found["reason"]
