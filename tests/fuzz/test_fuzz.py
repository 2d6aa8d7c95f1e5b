"""The fuzzer itself, the cases that once failed, and some of the first seeds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from loraover.adapters.convert.methods import METHODS

from fuzz import run as fuzz_run
from fuzz.__main__ import run_for
from fuzz.cases import BASES, VERBS, Case, draw
from fuzz.run import keep, kept, run
from support.faults import Scaling

PLAIN = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 2}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def test_every_kind_base_and_verb_is_drawn() -> None:
    cases = [draw(seed) for seed in range(3000)]
    assert {case.kind for case in cases} == METHODS.keys()
    assert {case.base for case in cases} == BASES.keys()
    assert {case.verb for case in cases} == VERBS.keys() == fuzz_run.VERBS.keys()
    assert draw(7) == cases[7]


def test_a_kept_case_is_read_back(tmp_path: Path) -> None:
    keep(draw(3), tmp_path / "cases")
    keep(draw(4), tmp_path / "cases")
    assert kept(tmp_path / "cases") == [draw(3), draw(4)]


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("onnx", "check")])
def test_a_wrong_scaling_is_a_fault(verb: str, bases: Path, wrong_scaling: Scaling) -> None:
    """The verb reads twice the scaling; PEFT reads the right one."""
    case = Case(0, "LORA", "qwen2", PLAIN, verb, dict(VERBS[verb][0]))
    assert run(case, bases).outcome == "agrees"
    wrong_scaling(2)
    assert run(case, bases).outcome == "fault"


def test_an_exception_that_is_not_ours_is_a_fault(bases: Path) -> None:
    found = run(Case(0, "LORA", "qwen2", PLAIN, "gguf", {"no_such_option": 1}), bases)
    assert (found.outcome, "TypeError" in found.found) == ("fault", True)


@pytest.mark.parametrize("case", kept(), ids=lambda case: "-".join([case.verb, case.kind, *case.edits]))
def test_a_kept_case_does_not_fail_again(case: Case, bases: Path) -> None:
    found = run(case, bases)
    assert found.outcome != "fault", found.found


SECONDS = 5.0
"""Time in which as many cases are run as there is room for, and at least three that agree."""


@pytest.mark.statistical
def test_some_cases_without_a_fault(bases: Path) -> None:
    """Graphs are left out, since building one takes seconds; `make fuzz` builds them."""
    begun, agree = time.monotonic(), 0
    for case, result in run_for(300.0, 0, bases, without="onnx"):
        assert result.outcome != "fault", (case, result.found)
        agree += result.outcome == "agrees"
        if agree >= 3 and time.monotonic() - begun > SECONDS:
            return
    raise AssertionError(f"{agree} cases agree, expected 3")
