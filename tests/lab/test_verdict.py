"""The sentence at the head of a study, for every verdict, and the rule that a study registers before its runs."""

from __future__ import annotations

import re
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from loraover.common.errors import ConfigError
from loraover_lab.study.analysis import Difference, RateSensitivity
from loraover_lab.study.grid import grid_of
from loraover_lab.study.outcome import RunOutcome
from loraover_lab.study.report import RULE_FILE, MethodResult, Rule, StudyReport, TaskResult, fixed_rule, words
from loraover_lab.study.request import StudyRequest
from loraover_lab.study.runner import make_report
from loraover_lab.study.show import hours_text, to_markdown
from loraover_lab.study.verdict import NOTHING, changes, verdict_of

from support.reports import kept_study
from support.tiny_hub import write_recipe

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


TASKS = ("gsm8k.yaml", "qnli.yaml", "svamp.yaml")


def test_a_rule_is_written_down_once_and_holds(tmp_path: Path) -> None:
    first = fixed_rule(StudyRequest(TASKS, tmp_path, required=2), 0)
    assert first == Rule(required=2, tasks=3, finished_before=0)
    assert Rule.model_validate_json((tmp_path / RULE_FILE).read_text()) == first
    for again in (StudyRequest(TASKS, tmp_path), StudyRequest(TASKS, tmp_path, required=2)):
        assert fixed_rule(again, 9) == first
    for other in (StudyRequest(TASKS, tmp_path, required=1), StudyRequest(TASKS[:2], tmp_path)):
        with pytest.raises(ConfigError, match="begun with required 2 of 3 tasks"):
            fixed_rule(other, 9)


def test_a_study_that_only_reports_fixes_no_rule(tmp_path: Path) -> None:
    rule = fixed_rule(StudyRequest(TASKS, tmp_path, report_only=True), 7)
    assert rule == Rule(required=3, tasks=3, finished_before=7)
    assert not (tmp_path / RULE_FILE).exists()


def test_a_name_stands_for_its_method_everywhere(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "task.yaml", "none", evaluation={"examples": 12})
    request = StudyRequest(
        recipe,
        tmp_path,
        methods="wide,lora-over",
        names={"wide": "lora:r=64"},
        lr_sweep={"task/wide": [1e-3], "": [1e-2]},
        seeds=2,
    )
    assert request.trained == ("lora:r=64", "lora-over")
    assert "--name wide=lora:r=64" in request.command()
    grid = grid_of(request)
    assert {run.name.split("/")[1] for run in grid} == {"lora_r=64", "lora-over"}  # kept runs have the long names
    assert [run.rate for run in grid] == [1e-3, 1e-2] * 2
    rule = Rule(required=1, tasks=1, finished_before=0)
    outcome = RunOutcome(recipe="", nats=[20.0] * 12, tokens=[20] * 12)
    report: StudyReport = make_report(grid, dict.fromkeys(grid, outcome), rule, "")
    assert words(report.tasks)[0].startswith("task: lora-over and wide cannot be told apart")
    assert "| wide | 0.001 (end) |" in to_markdown(report)
    assert "| wide | lora:r=64 |" in to_markdown(report)


def test_less_than_an_hour_is_told_in_minutes() -> None:
    assert [hours_text(hours) for hours in (0.01, 0.75, 1.25)] == ["1 min", "45 min", "1.2 h"]
