"""The judge of training loops that sample from an engine, on made-up loops with every fault that it names."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraover.common.errors import CheckpointError, ConfigError
from loraover_serve import Finding, RolloutJudge, judge_rollouts, scale_faults
from loraover_serve.judge.names import INTERMITTENT, NOT_APPLIED, SCALED, STALE

from oracles import prompt_estimates as oracle
from support.rollout_loop import EXACT, ROUNDED, Loop, Step


def findings(loop: Loop, steps: int, judge: RolloutJudge | None = None, **more: Any) -> Iterator[Finding]:
    judge = judge or RolloutJudge()
    for each in loop.steps(steps):
        yield judge.step(**each.given | more)


def last_step(loop: Loop, steps: int = 6) -> Step:
    return [*loop.steps(steps)][-1]


@pytest.mark.parametrize(("grid", "rate"), [(EXACT, 0.02), (ROUNDED, 0.05)])
def test_a_right_loop_is_as_trained_and_never_differs(grid: float, rate: float) -> None:
    found = [*findings(Loop(0, grid, rate), 8, faults={})]
    assert found[0].verdict is None
    assert "B = 0" in found[0].reason
    assert {each.verdict for each in found[1:]} <= {"too early", "applied, scale not known yet", "as trained"}
    assert found[-1].verdict == "as trained"
    assert NOT_APPLIED in found[-1].excluded
    assert not {"half the scale", "twice the scale", NOT_APPLIED} & {*found[-1].not_excluded}


def test_rounding_hides_a_young_adapter_and_then_its_scale() -> None:
    """The verdicts come in the order of their evidence, and each says what is not excluded."""
    found = [*findings(Loop(0, ROUNDED, 0.05), 8, faults={})]
    order = ["too early", "applied, scale not known yet", "as trained"]
    places = [order.index(str(each.verdict)) for each in found[1:]]
    assert places == sorted(places)
    assert {1, 2} <= {*places}
    early = next(each for each in findings(Loop(0, ROUNDED, 0.01), 2, faults={}) if each.verdict == "too early")
    assert early.in_a_line.startswith(f"{early.reason}; not excluded yet: served as base")
    assert "half the scale" in early.not_excluded


def test_a_factor_that_rounding_sets_off_from_0_is_the_base_model() -> None:
    step = last_step(Loop(0, EXACT, 0.02, "base"))
    e = [b - 1e-5 * (a - b) for a, b in zip(step.a, step.b, strict=True)]
    found = judge_rollouts(**(step.given | {"e": e, "faults": {}}), noise=1e-6)
    assert (found.verdict, found.fault) == ("differs", NOT_APPLIED), found.reason


def test_an_earlier_adapter_whose_b_was_zero_is_the_base_model() -> None:
    """Also where its logprobs, of sums with zeros in them, are a little nearer than those without it."""
    step = last_step(Loop(0, EXACT, 0.02, "base"))
    served = [b - 1e-9 for b in step.b]
    found = judge_rollouts(**(step.given | {"e": served, "earlier": [step.a, served], "faults": {}}), noise=1e-6)
    assert (found.verdict, found.fault) == ("differs", NOT_APPLIED), found.reason
    assert "stale by 2" in found.not_excluded


def test_noise_is_no_fault() -> None:
    """While rounding is larger than the adapter's change, the strength is anywhere around 1/2."""
    loops = [Loop(seed, ROUNDED, 0.01, answers=1, tokens=6) for seed in range(12)]
    found = [judge_rollouts(**last_step(loop, 2).given, noise=0.04) for loop in loops]
    assert any(each.strength is not None and each.strength.value < 0.5 for each in found)
    assert all(each.verdict != "differs" for each in found)


@pytest.mark.parametrize(("kept", "verdict"), [(0.75, "applied, scale not known yet"), (0.85, "as trained")])
def test_the_scale_is_said_where_a_fifth_of_the_change_or_less_can_be_noise(kept: float, verdict: str) -> None:
    step = last_step(Loop(0, EXACT, 0.02), 2)
    effect = judge_rollouts(**step.given).effect
    found = judge_rollouts(**step.given, noise=effect * math.sqrt((1 - kept) / 2))
    assert found.reliable == pytest.approx(kept)
    assert found.verdict == verdict


FAULTS = [
    ("base", EXACT, 1, NOT_APPLIED, NOT_APPLIED),
    ("stale by 1", EXACT, 2, STALE, "stale by 1"),
    ("stale by 2", EXACT, 3, STALE, "stale by 2"),
    ("times 0.5", EXACT, 2, SCALED, "half the scale"),
    ("times 2", EXACT, 2, SCALED, "twice the scale"),
    ("times 4", EXACT, 2, SCALED, "the adapter's scale twice"),
    ("times 0.25", EXACT, 2, SCALED, "scale 1 in place of the adapter's"),
    ("another", EXACT, 1, "another", "another"),
    ("attention", EXACT, 1, "attention", "attention"),
    ("temperature", EXACT, 0, "temperature", "temperature"),
    ("template", EXACT, 0, "template", "template"),
    ("kept", EXACT, 2, "kept", "kept"),
    ("mixed base", EXACT, 1, INTERMITTENT, ""),
    ("mixed stale by 1", EXACT, 2, "some answers are those of: stale by 1", ""),
    ("base", ROUNDED, 3, NOT_APPLIED, NOT_APPLIED),
    ("stale by 1", ROUNDED, 5, STALE, "stale by 1"),
    ("times 0.5", ROUNDED, 5, SCALED, "half the scale"),
    ("another", ROUNDED, 4, "another", "another"),
    ("attention", ROUNDED, 4, "attention", "attention"),
    ("temperature", ROUNDED, 0, "temperature", "temperature"),
    ("mixed base", ROUNDED, 6, INTERMITTENT, ""),
]
"""Fault of the engine, grid of its rounding, step by which it is named, its name, and what its nearest suspect has."""


@pytest.mark.parametrize(("fault", "grid", "by", "name", "detail"), FAULTS)
def test_each_fault_is_named(fault: str, grid: float, by: int, name: str, detail: str) -> None:
    judge = RolloutJudge(noise=None if by else 0.04)
    loop = Loop(3, grid, 0.02 if grid == EXACT else 0.05, fault)
    named = []
    for step in loop.steps(by + 1):
        found = judge.step(**step.given | {"faults": {**step.faults, **scale_faults(4.0)}})
        named.append(found.fault if found.verdict == "differs" else None)
    assert found.verdict == "differs", found.reason
    assert found.fault == name, found.reason
    if detail:
        assert detail in found.suspects[0].detail
    assert found.reason.startswith(name)


def test_a_fault_that_begins_later_is_named_at_once_and_not_when_it_is_over() -> None:
    right, wrong = (Loop(1, EXACT, 0.02, fault, tokens=8).steps(8) for fault in ("", "base"))
    judge, verdicts = RolloutJudge(4), []
    for index, (good, bad) in enumerate(zip(right, wrong, strict=True)):
        verdicts.append(judge.step(**(bad if index in (4, 5) else good).given | {"faults": {}}).verdict)
    assert [index for index, each in enumerate(verdicts) if each == "differs"] == [4, 5]


def test_another_adapter_that_is_not_given_has_no_name() -> None:
    step = last_step(Loop(2, EXACT, 0.05, "another"))
    found = judge_rollouts(**step.given | {"faults": {}}, noise=1e-5)
    assert (found.verdict, found.fault) == ("differs", None)
    assert "no known fault explains it" in found.reason


def test_what_the_strength_cannot_see_is_found_by_its_distance() -> None:
    step = last_step(Loop(2, EXACT, 0.02, "template"))
    known, unknown = (judge_rollouts(**step.given | {"faults": {}}, noise=noise) for noise in (1e-5, None))
    assert known.verdict == "differs"
    assert unknown.verdict != "as trained"


def test_arrays_as_near_as_the_named_one_are_told() -> None:
    step = last_step(Loop(1, EXACT, 0.02, "base"), 2)
    found = judge_rollouts(**step.given, noise=1e-5)
    assert found.fault == NOT_APPLIED
    assert [*found.not_excluded[:2]] == ["stale by 1", "stale by 2"]


def test_the_strength_is_that_of_numpy() -> None:
    loop = Loop(5, ROUNDED, 0.08)
    step = last_step(loop)
    found = judge_rollouts(**step.given).strength
    e, a, b = (np.reshape(each, (loop.prompts, -1)) for each in (step.e, step.a, step.b))
    expected = oracle.strength(oracle.Projections((e - b) * (a - b), (a - b) ** 2, (e - b) ** 2))
    assert found is not None
    assert found.value == pytest.approx(float(expected.value), rel=1e-9)
    assert found.half == pytest.approx(float(expected.half), rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["", "base", "mixed base"]))
def test_the_order_of_tokens_does_not_count(seed: int, fault: str) -> None:
    step = last_step(Loop(seed % 50, EXACT, 0.03, fault, answers=1, tokens=6), 3)
    order = np.random.default_rng(seed).permutation(len(step.e))
    first = judge_rollouts(**step.given, noise=1e-5)
    given_: dict[str, Any] = {
        name: [each[i] for i in order] for name, each in vars(step).items() if name not in ("earlier", "faults")
    }
    given_["earlier"] = [[each[i] for i in order] for each in step.earlier]
    given_["faults"] = {name: [each[i] for i in order] for name, each in step.faults.items()}
    again = judge_rollouts(**given_, noise=1e-5)
    assert (again.verdict, again.fault) == (first.verdict, first.fault)
    assert again.effect == pytest.approx(first.effect)
    assert again.strength is not None
    assert first.strength is not None
    assert again.strength.value == pytest.approx(first.strength.value)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 50), st.sampled_from(["", "base", "times 0.5"]))
def test_steps_that_are_pooled_are_one_step(seed: int, fault: str) -> None:
    steps = [*Loop(seed, ROUNDED, 0.1, fault, answers=1, tokens=6).steps(3)][1:]
    judge = RolloutJudge(noise=0.04)
    for step in steps:
        found = judge.step(**step.given)
    if found.tokens == len(steps[1].e):
        return  # the newest step has decided alone
    whole = {name: [*getattr(steps[0], name), *getattr(steps[1], name)] for name in ("e", "a", "b", "prompt_ids")}
    rows = [(index, row) for index, step in enumerate(steps) for row in step.rows]
    earlier = [[*one, *other] for one, other in zip(steps[0].earlier, steps[1].earlier, strict=True)]
    faults = {name: [*steps[0].faults[name], *steps[1].faults[name]] for name in steps[0].faults}
    assert judge_rollouts(**whole, rows=rows, earlier=earlier, faults=faults, noise=0.04) == found


def test_the_number_of_tokens_that_it_takes_decides() -> None:
    loop = Loop(4, ROUNDED, 0.05, prompts=8, answers=1, tokens=2)
    early = judge_rollouts(**last_step(loop, 3).given, noise=0.03)
    assert early.verdict == "too early"
    assert early.needed is not None
    assert str(early.needed) in early.reason
    many = last_step(replace(loop, prompts=math.ceil(early.needed / 2)), 3)
    assert NOT_APPLIED in judge_rollouts(**many.given, noise=0.03).excluded


SENTENCES = {
    "different lengths": {"b": [-1.0]},
    "no tokens": {name: [] for name in ("e", "a", "b", "prompt_ids", "rows", "positions")},
    "NaN, infinite or above 0": {"e": [-1.0, math.nan, -1.0, -1.0]},
    "expected logprobs in nats": {"a": [-1.0, 2.0, -1.0, -1.0]},
    "not a number": {"a": [-1.0, "?", -1.0, -1.0]},
    "one prompt": {"prompt_ids": [1, 1, 1, 1]},
    "two prompts": {"rows": [0, 0, 0, 1]},
    "there twice, and disagrees": {"rows": [0, 0, 1, 1], "positions": [0, 0, 0, 1]},
    "there twice, with equal": {"rows": [0, 0, 1, 1], "positions": [0, 1, 0, 0]},
    "B = 0": {"b": [-1.0, -2.0, -1.5, -1.5]},
    "the noise is nan": {"noise": math.nan},
    "not a finite number": {"faults": {"scale": math.inf}},
    "different lengths (e 4": {"earlier": [[-1.0]]},
}


@pytest.mark.parametrize(("sentence", "changed"), SENTENCES.items(), ids=SENTENCES)
def test_arrays_that_show_nothing_get_a_sentence_and_no_verdict(sentence: str, changed: dict[str, Any]) -> None:
    right = {"e": [-1.1, -2.0, -1.5, -1.5], "a": [-1.0, -2.0, -1.5, -1.5], "b": [-1.2, -2.2, -1.4, -1.1]}
    found = judge_rollouts(**{**right, "prompt_ids": [0, 0, 1, 1], **changed})
    assert found.verdict is None
    assert sentence in found.reason


def test_prompts_that_the_engine_has_read_otherwise_are_not_comparable() -> None:
    step = last_step(Loop(0, EXACT, 0.02), 2)
    read = [-1 if prompt == step.prompt_ids[0] else prompt for prompt in step.prompt_ids]
    for judged in (judge_rollouts, RolloutJudge().step):
        found = judged(**step.given, engine_prompt_ids=read)
        assert found.verdict == "not comparable"
        assert "1 of 8 prompts" in found.reason
        assert judged(**step.given, engine_prompt_ids=step.prompt_ids).verdict != "not comparable"


def test_any_array_is_taken() -> None:
    step = last_step(Loop(0, EXACT, 0.02), 2)
    given_: dict[str, Any] = {
        name: np.array(each) for name, each in vars(step).items() if name not in ("earlier", "faults")
    }
    given_ |= {"earlier": np.array(step.earlier), "faults": step.faults}
    assert judge_rollouts(**given_) == judge_rollouts(**step.given)


@pytest.mark.parametrize("until", [1, 4])
def test_a_resumed_judge_goes_on_as_one_that_was_not_stopped(until: int) -> None:
    steps = [*Loop(7, ROUNDED, 0.05).steps(6)]
    first, second = RolloutJudge(), RolloutJudge()
    for step in steps[:until]:
        first.step(**step.given)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.noise == first.noise
    for step in steps[until:]:
        assert first.step(**step.given) == second.step(**step.given)


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        {"schema": 2},
        {"schema": 1, "noise": {"square": -1.0, "tokens": 1}, "steps": []},
        {"schema": 1, "noise": {"square": 1.0, "tokens": 1}, "steps": [{}]},
        {"schema": 1, "noise": {"square": 1.0, "tokens": 1}, "steps": 3},
    ],
)
def test_a_state_that_was_not_written_by_it_is_refused(state: Any) -> None:
    judge = RolloutJudge()
    with pytest.raises(CheckpointError, match="state of RolloutJudge"):
        judge.load_state_dict(state)
    assert judge.noise is None


def test_a_window_has_a_step_at_least() -> None:
    with pytest.raises(ConfigError, match="window is 0"):
        RolloutJudge(0)


@pytest.mark.process
def test_neither_torch_nor_numpy_is_needed() -> None:
    code = (
        "import sys; from loraover_serve import judge_rollouts, RolloutJudge; "
        "judge_rollouts([-1.0, -1.0], [-1.0, -1.5], [-1.1, -1.4], [0, 1]); "
        "assert not {'torch', 'numpy', 'pydantic'} & sys.modules.keys(), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
