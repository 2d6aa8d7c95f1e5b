"""The study that `docs/study/` reports is what its kept runs say."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraover.study.grid import make_grid
from loraover.study.report import StudyReport
from loraover.study.runner import DEFAULTS, finished, make_report

DOCS = Path(__file__).parents[2] / "docs" / "study"
RATES = {"gsm8k": (1e-3, 3e-3, 1e-2), "qnli": (3e-4, 1e-3, 3e-3), "subj": (1e-3, 3e-3, 1e-2)}
SEEDS = 5


def test_the_kept_report_is_that_of_the_kept_runs() -> None:
    recipes = [str(DOCS / f"{task}.yaml") for task in RATES]
    grid = make_grid(recipes, {"lora": (), "lora-over": ()}, SEEDS, dict(DEFAULTS), RATES)
    report = make_report(grid, finished(grid, DOCS / "smollm2"), "")
    kept = StudyReport.model_validate_json((DOCS / "smollm2" / "study.json").read_text())
    assert report.is_whole
    for task, kept_task in zip(report.tasks, kept.tasks, strict=True):
        for result, known in zip(task.methods, kept_task.methods, strict=True):
            assert (result.method, result.rate) == (known.method, known.rate)
            assert result.test_loss == pytest.approx(known.test_loss)
            if result.difference is not None and known.difference is not None:
                assert result.difference.interval == pytest.approx(known.difference.interval)


def test_the_docs_quote_it() -> None:
    quoted = (DOCS / "README.md").read_text()
    kept = StudyReport.model_validate_json((DOCS / "smollm2" / "study.json").read_text())
    for task in kept.tasks:
        for result in task.methods:
            assert f"{result.test_loss:.4f} ({result.deviation:.4f})" in quoted
            if result.difference is not None:
                low, high = result.difference.interval
                assert f"{result.difference.mean:+.4f} [{low:+.4f}, {high:+.4f}]" in quoted
