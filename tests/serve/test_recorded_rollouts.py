"""Loops of SmolLM2 with real logprobs: right ones never differ, each fault is named, and six are of public threads.

The trainer computes candidates in the engine's number format, those of the scale included.
"""

from __future__ import annotations

from functools import cache
from typing import Any

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


def first_alarm(number_format: str, fault: str, since: int) -> tuple[int | None, Any]:
    found = findings(number_format, fault, since)
    at = next((step for step, each in enumerate(found) if each.verdict == "differs"), None)
    return at, None if at is None else found[at].fault


def test_verl_7495_every_sync_sends_the_frozen_base_model() -> None:
    """All rollouts came from the initial policy, for two months."""
    assert first_alarm("fp32", "base", 0) == (1, NOT_APPLIED)
    assert first_alarm("bf16", "base", 0) == (2, NOT_APPLIED)


def test_miles_2075_the_session_server_names_no_adapter() -> None:
    """Rollouts are right, until those of a session come from the base model."""
    assert first_alarm("fp32", "base", 6) == (6, NOT_APPLIED)
    at, name = first_alarm("bf16", "base", 6)
    assert (name, at in (6, 7)) == (NOT_APPLIED, True)


def test_trl_5312_rollouts_of_the_adapter_before() -> None:
    assert first_alarm("fp32", "stale by 1", 2) == (2, STALE)
    at, name = first_alarm("bf16", "stale by 1", 2)
    assert (name, at in (2, 3)) == (STALE, True)


def test_ms_swift_6343_new_weights_on_the_cached_prompt_of_an_earlier_version() -> None:
    assert first_alarm("fp32", "kept", 0) == (1, "kept")
    at, name = first_alarm("bf16", "kept", 0)
    assert (name, at in (2, 3)) == ("kept", True)


def test_unirl_155_the_scaling_becomes_1() -> None:
    assert first_alarm("fp32", "times 0.25", 0) == (1, SCALE_1)
    at, name = first_alarm("bf16", "times 0.25", 0)
    assert (name, at in (2, 3)) == (SCALE_1, True)


def test_miles_3232_the_adapter_is_counted_twice() -> None:
    """It is merged into the weights that are sent, and applied to them again."""
    assert first_alarm("fp32", "times 2", 0) == (1, TWICE)
    at, name = first_alarm("bf16", "times 2", 0)
    assert (name, at in (2, 3)) == (TWICE, True)
