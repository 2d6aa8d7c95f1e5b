"""The sentence at the head of a study, for every verdict, and what the study could have seen."""

from __future__ import annotations

import re
from dataclasses import astuple
from typing import Any

import pytest

from loraover_lab.study.analysis import Difference, RateSensitivity
from loraover_lab.study.report import MethodResult, Rule, StudyReport, TaskResult
from loraover_lab.study.verdict import NOTHING, changes, verdict_of

from support.reports import kept_study

OVER = "lora-over"
BELOW, ABOVE, SAME = (-0.04, 0.01), (0.04, 0.01), (-0.01, 0.02)
"""Difference of a method, and half its interval, as shares of the baseline's loss."""


def method(name: str, gap: tuple[float, float] | None = None, *, is_bracketed: bool = True) -> MethodResult:
    """A method beside a baseline whose loss is 2 nats."""
    found = None
    if gap is not None:
        mean, half = (2 * share for share in gap)
        p = 0.001 if abs(mean) > half else 0.5
        found = Difference(mean=mean, interval=(mean - half, mean + half), p=p, detectable=1.5 * half)
    swept: Any = {"best_rate": 1e-3, "is_bracketed": is_bracketed}
    shown: Any = {"rate": 1e-3, "test_loss": 2.0, "sensitivity": RateSensitivity.model_construct(**swept)}
    return MethodResult.model_construct(method=name, difference=found, **shown)


def task(name: str, *gaps: tuple[float, float], failed: bool = False, **baseline: Any) -> TaskResult:
    over = [method(OVER if i == 0 else f"{OVER}:r={i}", gap) for i, gap in enumerate(gaps)]
    lost = [OVER] if failed else []
    methods = [method("lora", **baseline), *over]
    return TaskResult(task=name, examples=40, baseline="lora", methods=methods, failed=lost, failures=[])


def study(*tasks: TaskResult, **changed: Any) -> StudyReport:
    rule = Rule(
        required=changed.pop("required", 1), tasks=len(tasks), finished_before=changed.pop("finished_before", 0)
    )
    return kept_study().model_copy(update={"tasks": list(tasks), "rule": rule} | changed)


def text(gap: tuple[float, float], name: str) -> str:
    mean, half = (100 * share for share in gap)
    return f"On {name}: {mean:+.1f} %, 95 % interval {mean - half:+.1f} to {mean + half:+.1f}"


@pytest.mark.parametrize(
    ("tasks", "tone", "word", "expected"),
    [
        (
            [task("a", BELOW), task("b", BELOW)],
            "good",
            "better",
            f"LoRA-Over's loss is below a tuned plain LoRA's on a and b. {text(BELOW, 'a')}. {text(BELOW, 'b')}.",
        ),
        (
            [task("a", ABOVE)],
            "bad",
            "worse",
            f"LoRA-Over's loss is above a tuned plain LoRA's on a. {text(ABOVE, 'a')}.",
        ),
        (
            [task("a", BELOW), task("b", ABOVE)],
            "open",
            "better on some tasks, worse on others",
            "LoRA-Over's loss is below a tuned plain LoRA's on a and above a tuned plain LoRA's on b. "
            f"{text(BELOW, 'a')}. {text(ABOVE, 'b')}.",
        ),
        (
            [task("a", BELOW), task("b", SAME)],
            "good",
            "better",
            "LoRA-Over's loss is below a tuned plain LoRA's on a. On b, the two cannot be told apart. "
            f"{text(BELOW, 'a')}. {text(SAME, 'b')}; 3 % could have been seen.",
        ),
        (
            [task("a", SAME), task("b", SAME)],
            "open",
            "cannot be told apart",
            f"LoRA-Over and a tuned plain LoRA cannot be told apart. {text(SAME, 'a')}; 3 % could have been seen. "
            f"{text(SAME, 'b')}; 3 % could have been seen.",
        ),
        ([task("a", failed=True)], "bad", "worse", "LoRA-Over failed at every rate on a."),
        ([task("a")], "open", "unknown", NOTHING),
        (
            [task("a", BELOW, ABOVE)],
            "open",
            "depends on the setting",
            f"lora-over's loss is below a tuned plain LoRA's on a. {text(BELOW, 'a')}. lora-over:r=1's loss is above a "
            f"tuned plain LoRA's on a. {text(ABOVE, 'a')}. Nothing corrects for the number of settings.",
        ),
        (
            [task("a", BELOW, is_bracketed=False)],
            "open",
            "not shown",
            f"{text(BELOW, 'a')}. It shows nothing: the sweep did not bracket the best rate of lora.",
        ),
        (
            [task("a", SAME, is_bracketed=False)],
            "open",
            "cannot be told apart",
            f"LoRA-Over and a tuned plain LoRA cannot be told apart. {text(SAME, 'a')}; 3 % could have been seen. The "
            "sweep did not bracket plain LoRA's best rate on a.",
        ),
        (
            [task("a", ABOVE).model_copy(update={"examples": 6}), task("b", ABOVE)],
            "open",
            "not shown",
            f"LoRA-Over's loss is above a tuned plain LoRA's on b. {text(ABOVE, 'b')}. {text(ABOVE, 'a')}. It shows "
            "nothing: it has 6 test examples, and 20 are needed.",
        ),
    ],
)
def test_each_verdict_has_its_figures(tasks: list[TaskResult], tone: str, word: str, expected: str) -> None:
    verdict = verdict_of(study(*tasks))
    assert (verdict.tone, verdict.word, verdict.sentence) == (tone, word, expected)


def test_an_unfinished_study_says_so() -> None:
    found = verdict_of(study(task("a", BELOW), is_whole=False))
    assert (found.tone, found.word) == ("open", "better")
    assert found.sentence.endswith("The study is not finished.")


def test_better_on_fewer_tasks_than_the_rule_requires_is_not_shown() -> None:
    tasks = [task("a", BELOW), task("b", BELOW), task("c", SAME)]
    found = [verdict_of(study(*tasks, required=required)) for required in (2, 3)]
    assert [(one.tone, one.word) for one in found] == [("good", "better"), ("open", "not shown")]


def test_a_rule_that_was_written_down_after_a_run_makes_no_verdict_good() -> None:
    (tone, word, _), rule = astuple(verdict_of(late := study(task("a", BELOW), finished_before=1))), late.rule
    assert (tone, word) == ("open", "better")
    assert str(rule).endswith("at least 1 of 1 task; this rule was written down after the first run had finished.")


def test_a_method_that_seems_worse_has_to_be_tuned() -> None:
    found = [method("lora"), method(OVER, ABOVE, is_bracketed=False)]
    verdict = verdict_of(study(task("a").model_copy(update={"methods": found})))
    assert (verdict.tone, verdict.word) == ("open", "not shown")


def test_no_end_of_an_interval_looks_like_zero() -> None:
    """The first difference is none, and the second is beyond chance."""
    (none, small) = changes(study(task("a", (-0.0001, 0.0002)), task("b", (-0.0009, 0.0005))))
    assert str(none) == "On a: -0.01 %, 95 % interval -0.03 to +0.01"
    assert str(small) == "On b: -0.09 %, 95 % interval -0.14 to -0.04"


def test_a_difference_of_nothing_has_no_sign_of_its_own() -> None:
    (change,) = changes(study(task("a", (-0.0, 0.0))))
    assert str(change) == "On a: +0.0 %, 95 % interval +0.0 to +0.0"


def test_the_kept_study_could_see_large_differences_only() -> None:
    seen = re.findall(r"On (\w+): [^;]*; ([\d.]+) % could have been seen", verdict_of(kept_study()).sentence)
    assert seen == [("gsm8k", "0.85"), ("qnli", "6.7"), ("subj", "41")]
    assert [round(change.mean, 1) for change in changes(kept_study())] == [0.1, -0.4, -3.5]
