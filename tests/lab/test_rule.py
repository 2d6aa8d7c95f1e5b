"""The rule of a study, which is fixed before its first run, and short names of methods."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraover.common.errors import ConfigError
from loraover_lab.study.grid import grid_of
from loraover_lab.study.outcome import RunOutcome
from loraover_lab.study.report import RULE_FILE, Rule, StudyReport, fixed_rule, words
from loraover_lab.study.request import StudyRequest
from loraover_lab.study.runner import make_report
from loraover_lab.study.show import hours_text, to_markdown

from support.tiny_hub import write_recipe

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
