"""Loops of SmolLM2 with real logprobs: right ones never differ, each fault is named, and six are of public threads.

The trainer computes candidates in the engine's number format, those of the scale included.
"""

from __future__ import annotations

from functools import cache

import pytest

from loraover_serve import Finding, RolloutJudge
from loraover_serve.judge.names import INTERMITTENT, NOT_APPLIED, STALE

from support.recorded_rollouts import Floats, planted, recorded

RECORDED = cache(recorded)
SCALE_1, TWICE = "scale 1 in place of the adapter's", "twice the scale"


def findings(number_format: str, fault: str, since: int = 0, steps: int | None = None) -> list[Finding]:
    kept: dict[str, Floats] = RECORDED(number_format)
    judge = RolloutJudge()
    return [judge.step(**each) for each in planted(kept, fault, since, scales=True)[:steps]]


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_a_right_loop_never_differs(number_format: str) -> None:
    found = findings(number_format, "")
    assert all(each.verdict != "differs" for each in found)
    assert (found[0].verdict, found[-1].verdict) == (None, "as trained")
    assert NOT_APPLIED in found[-1].excluded


FAULTS = [
    ("base", NOT_APPLIED, NOT_APPLIED),
    ("stale by 1", STALE, "stale by 1"),
    ("times 0.25", SCALE_1, SCALE_1),
    ("times 0.5", "half the scale", "half the scale"),
    ("times 2", TWICE, TWICE),
    ("times 4", "the adapter's scale twice", "the adapter's scale twice"),
    ("attention", "attention", "attention"),
    ("mlp", "mlp", "mlp"),
    ("layers", "layers", "layers"),
    ("another", "another", "another"),
    ("kept", "kept", "kept"),
]
"""Faults of the adapter, with their name and what the nearest suspect has."""


@pytest.mark.parametrize(("number_format", "step"), [("fp32", 2), ("bf16", 4)])
@pytest.mark.parametrize(("fault", "name", "detail"), FAULTS)
def test_a_fault_of_the_adapter_is_named(fault: str, name: str, detail: str, number_format: str, step: int) -> None:
    found = findings(number_format, fault, steps=step + 1)
    assert (found[-1].verdict, found[-1].fault) == ("differs", name), found[-1].reason
    assert found[-1].suspects[0].detail == detail


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("right, temperature", "temperature"),
        ("raw", "raw logprobs"),
        ("right, top-p", "top-p"),
        ("template", "template"),
    ],
)
def test_other_logprobs_are_named_before_there_is_an_adapter(fault: str, name: str, number_format: str) -> None:
    assert findings(number_format, fault, steps=1)[0].fault == name


@pytest.mark.parametrize(
    ("fault", "name", "step", "share"),
    [
        ("half base", INTERMITTENT, 1, 0.5),
        ("half stale by 1", "some answers are those of: stale by 1", 2, 0.5),
        ("a quarter stale by 2", "some answers are those of: stale by 2", 3, 0.25),
    ],
)
def test_replicas_that_differ_are_named_by_their_rows(fault: str, name: str, step: int, share: float) -> None:
    found = findings("fp32", fault, steps=step + 1)[-1]
    assert (found.verdict, found.fault) == ("differs", name), found.reason
    assert found.share == pytest.approx(share)


def test_an_adapter_that_a_factor_explains_no_better_than_the_base_model_is_served_as_base() -> None:
    """In bfloat16, a factor that was fitted to noise is nearer than the base model itself, and names nothing."""
    for each in findings("bf16", "base"):
        assert each.verdict != "differs" or each.fault == NOT_APPLIED


def test_scales_that_were_not_computed_in_the_engines_format_are_not_excluded() -> None:
    kept = RECORDED("bf16")
    judge = RolloutJudge()
    found = [judge.step(**each) for each in planted(kept, "times 0.5")[:8]]
    wrong = [each for each in found if each.verdict == "differs"]
    assert wrong
    for each in wrong:
        assert each.fault is None or any("half the scale" in name for name in each.not_excluded), each.reason


THREADS = {
    "verl 7495: every sync sends the frozen base model": ("base", 0, NOT_APPLIED, {1}, {2}),
    "miles 2075: the session server names no adapter, from step 6 on": ("base", 6, NOT_APPLIED, {6}, {6, 7}),
    "trl 5312: rollouts are those of the adapter before": ("stale by 1", 2, STALE, {2}, {2, 3}),
    "ms-swift 6343: new weights on a prompt that an earlier version has cached": ("kept", 0, "kept", {1}, {2, 3}),
    "unirl 155: the scaling becomes 1": ("times 0.25", 0, SCALE_1, {1}, {2, 3}),
    "miles 3232: the adapter is merged into the weights, and applied again": ("times 2", 0, TWICE, {1}, {2, 3}),
}
"""Public threads: the fault, its first step, its name, and steps of the first alarm in float32 and in bfloat16."""


@pytest.mark.parametrize("thread", THREADS)
def test_a_fault_of_a_public_thread_is_named_at_its_first_steps(thread: str) -> None:
    fault, since, name, exact, rounded = THREADS[thread]
    for number_format, steps in (("fp32", exact), ("bf16", rounded)):
        found = findings(number_format, fault, since)
        at = next(step for step, each in enumerate(found) if each.verdict == "differs")
        assert (found[at].fault, at in steps) == (name, True), (number_format, at)
