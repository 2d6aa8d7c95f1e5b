"""What a report says of outcomes that are made up: choice of rates and baseline, verdicts, failures."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from loraover.common.errors import LoraOverError
from loraover.common.multiple_testing import holm
from loraover_lab.study.analysis import Halves
from loraover_lab.study.grid import Run
from loraover_lab.study.outcome import DIVERGED, OUT_OF_MEMORY, RunOutcome
from loraover_lab.study.report import Rule, StudyReport, TaskResult, task_results, words
from loraover_lab.study.runner import make_report
from loraover_lab.study.show import to_markdown, to_page
from loraover_lab.study.verdict import verdict_of

from support.study_grid import make_grid
from support.tiny_hub import write_recipe

RATES = (1e-4, 1e-3, 1e-2)
SEEDS, EXAMPLES = 5, 40
RULE = Rule(required=1, tasks=1, finished_before=0)
TOKENS = 20
Losses = Mapping[str, tuple[float, float, float]]
"""Nats per token of a method at each rate."""

MIDDLE = (1.2, 1.0, 1.2)


def grid_of(folder: Path, methods: list[str], tasks: int = 1) -> list[Run]:
    recipes = [str(write_recipe(folder / f"task{i}.yaml", "none", evaluation={"examples": 12})) for i in range(tasks)]
    return make_grid(recipes, dict.fromkeys(methods, RATES), SEEDS, {})


def made_up(run: Run, loss: float, noise: float = 0.01) -> RunOutcome:
    """With effects of seed and example that the methods share, and some of their own."""
    shared = np.random.default_rng([run.seed, 1]).normal(0, 0.1, EXAMPLES)
    own = np.random.default_rng([run.seed, zlib.crc32(run.method.encode())]).normal(0, noise, EXAMPLES)
    nats = TOKENS * (loss + shared + own)
    return RunOutcome(recipe="", nats=nats.tolist(), tokens=[TOKENS] * EXAMPLES, step_seconds=0.5, peak_bytes=2**30)


def judged(runs: list[Run], losses: Losses, more: Mapping[str, Losses] | None = None) -> list[TaskResult]:
    """Args: more: losses of tasks that have their own."""
    by_task = {run.task: (more or {}).get(run.task, losses) for run in runs}
    outcomes = {run: made_up(run, by_task[run.task][run.method][RATES.index(run.rate)]) for run in runs}
    return task_results(runs, outcomes, SEEDS)


@pytest.mark.parametrize(
    ("over", "verdict", "word"),
    [
        (0.9, "lora-over beats lora", "better"),
        (1.1, "lora-over does not beat lora: it is worse", "worse"),
        (1.0, "lora-over and lora cannot be told apart", "cannot be told apart"),
    ],
)
def test_the_words_are_those_of_the_figures(over: float, verdict: str, word: str, tmp_path: Path) -> None:
    (task,) = tasks = judged(grid_of(tmp_path, ["lora", "lora-over"]), {"lora": MIDDLE, "lora-over": (1.2, over, 1.2)})
    (line,) = words(tasks)
    assert line.startswith(f"task0: {verdict}, each at its own tuned rate")
    assert "end of the sweep" not in line
    found = verdict_of(report_of(tasks))
    assert found.word == word
    assert to_markdown(report_of(tasks)).startswith(f"- {RULE} Verdict: {word}.\n- {found.sentence}\n- {line}")
    assert task.methods[1].difference is not None
    assert task.methods[1].difference.mean == pytest.approx(over - 1, abs=0.01)


def test_each_method_keeps_the_rate_that_validation_chose(tmp_path: Path) -> None:
    """The test half would choose another."""
    runs, halves = grid_of(tmp_path, ["lora", "lora-over"]), Halves(EXAMPLES)
    outcomes = {}
    for run in runs:
        nats = np.full(EXAMPLES, 2.0)
        nats[halves.validation] = 1.0 if run.rate == 1e-3 else 1.5
        nats[halves.test] = 3.0 if run.rate == 1e-3 else 0.1
        outcomes[run] = RunOutcome(recipe="", nats=(TOKENS * nats).tolist(), tokens=[TOKENS] * EXAMPLES)
    (task,) = task_results(runs, outcomes, SEEDS)
    assert [result.rate for result in task.methods] == [1e-3, 1e-3]
    assert [result.test_loss for result in task.methods] == pytest.approx([3.0, 3.0])
    assert task.methods[0].sensitivity.losses == {"0.0001": 1.5, "0.001": 1.0, "0.01": 1.5}


def test_the_baseline_is_the_best_plain_lora_whatever_else_is_better(tmp_path: Path) -> None:
    best = {"dora": 0.5, "lora:init_lora_weights=pissa": 0.6, "lora": 1.0, "lora:r=2": 0.8, "lora-matched": 0.9}
    (task,) = judged(grid_of_any(tmp_path, list(best)), {method: (1.2, loss, 1.2) for method, loss in best.items()})
    assert task.baseline == "lora:r=2"
    assert [result.method for result in task.methods if result.difference is None] == ["lora:r=2"]


def grid_of_any(folder: Path, methods: list[str]) -> list[Run]:
    """A grid whose methods are names only, so that no model is needed to find a rank."""
    plain = grid_of(folder, ["lora"])
    return [Run(run.task, method, run.rate, run.seed, run.recipe) for run in plain for method in methods]


def test_a_best_rate_at_an_end_is_marked_of_both(tmp_path: Path) -> None:
    runs = grid_of(tmp_path, ["lora", "lora-over"])
    tasks = judged(runs, {"lora": (1.2, 1.1, 1.0), "lora-over": (1.0, 1.1, 1.2)})
    assert "The best rate of lora and of lora-over is at an end of the sweep" in words(tasks)[0]
    report = report_of(tasks)
    assert "| lora | 0.01 (end) |" in to_markdown(report)
    assert "| lora-over | 0.0001 (end) |" in to_markdown(report)
    assert "0.01 (end)" in to_page(report).html
    (task,) = judged(runs, {"lora": (1.2, 1.1, 1.0), "lora-over": MIDDLE})
    assert "The best rate of lora is at an end of the sweep" in words([task])[0]


def test_p_values_are_holms_over_tasks_for_each_method(tmp_path: Path) -> None:
    runs = grid_of(tmp_path, ["lora", "lora-over", "dora"], tasks=3)
    more = {
        f"task{i}": {"lora": MIDDLE, "dora": MIDDLE, "lora-over": (1.2, 1 + gap, 1.2)}
        for i, gap in enumerate((0.0, -0.004, -0.1))
    }
    together = judged(runs, {}, more)
    alone = [judged([run for run in runs if run.task == task], {}, more)[0] for task in more]
    for method in ("lora-over", "dora"):
        raw, corrected = ([p_of(task, method) for task in tasks] for tasks in (alone, together))
        assert corrected == pytest.approx(holm(raw))
        assert corrected != pytest.approx(raw)


def test_holm_counts_the_task_on_which_a_method_failed(tmp_path: Path) -> None:
    runs = grid_of(tmp_path, ["lora", "lora-over"], tasks=2)
    better = {run: made_up(run, 0.97 if run.method == "lora-over" else 1.0, noise=0.1) for run in runs}
    lost = {run for run in runs if run.method == "lora-over" and run.task == "task1"}
    whole, failed = (
        task_results(runs, better | dict.fromkeys(gone, RunOutcome(recipe="", failure=DIVERGED)), SEEDS)
        for gone in ((), lost)
    )
    (alone,) = task_results([run for run in runs if run.task == "task0"], better, SEEDS)
    assert p_of(failed[0], "lora-over") == pytest.approx(2 * p_of(alone, "lora-over"))
    assert p_of(whole[0], "lora-over") >= p_of(alone, "lora-over")


def test_a_task_on_which_every_rate_failed_counts_as_worse(tmp_path: Path) -> None:
    runs = grid_of(tmp_path, ["lora", "lora-over"], tasks=2)
    outcomes = {
        run: made_up(run, (0.9 if run.method == "lora-over" else 1.0) + 0.2 * (run.rate != RATES[1])) for run in runs
    }
    lost = {run for run in runs if run.method == "lora-over" and run.task == "task1"}
    outcomes |= {run: RunOutcome(recipe="", failure=DIVERGED) for run in lost}
    tasks = task_results(runs, outcomes, SEEDS)
    assert tasks[1].failed == ["lora-over"]
    assert verdict_of(report_of(tasks)).word == "better on some tasks, worse on others"
    assert verdict_of(report_of(tasks[1:])).word == "worse"


def p_of(task: TaskResult, method: str) -> float:
    (found,) = [result.difference for result in task.methods if result.method == method]
    assert found is not None
    return found.p


def failed(runs: list[Run], failures: Mapping[tuple[str, float], str], losses: Losses) -> dict[Run, RunOutcome]:
    return {
        run: RunOutcome(recipe="", failure=failures[run.method, run.rate])
        if (run.method, run.rate) in failures
        else made_up(run, losses[run.method][RATES.index(run.rate)])
        for run in runs
    }


def test_nothing_stands_in_for_a_plain_lora_that_diverged(tmp_path: Path) -> None:
    runs = grid_of(tmp_path, ["lora", "lora-over"])
    outcomes = failed(runs, {("lora", rate): DIVERGED for rate in RATES}, {"lora-over": MIDDLE})
    (task,) = tasks = task_results(runs, outcomes, SEEDS)
    assert (task.baseline, [result.method for result in task.methods]) == (None, ["lora-over"])
    assert len(task.failures) == len(RATES) * SEEDS
    assert words(tasks) == ["task0: every plain LoRA failed at every rate, so nothing is compared."]
    report = report_of(tasks)
    assert verdict_of(report).word == "unknown"
    assert "| baseline |" not in to_markdown(report)
    assert "there is no baseline" in to_page(report).html


def test_a_task_of_which_every_run_failed_is_reported(tmp_path: Path) -> None:
    runs = grid_of(tmp_path, ["lora", "lora-over"])
    outcomes = {run: RunOutcome(recipe="", failure=OUT_OF_MEMORY) for run in runs}
    report = make_report(runs, outcomes, RULE, "")
    (task,) = report.tasks
    assert (task.methods, task.baseline) == ([], None)
    assert task.failures[0].endswith("seed-0: out of memory")
    assert "out of memory" in to_page(report).html


def test_a_rate_that_diverged_is_no_better_than_a_bad_one(tmp_path: Path) -> None:
    runs = grid_of(tmp_path, ["lora", "lora-over"])
    losses = {"lora": (1.2, 1.0, 9.0), "lora-over": (1.2, 1.0, 9.0)}
    (task,) = task_results(runs, failed(runs, {("lora-over", 1e-2): DIVERGED}, losses), SEEDS)
    bad, diverged = (result.sensitivity for result in task.methods)
    assert bad.regret == pytest.approx((0.2 + 8.0) / 3, rel=0.02)
    assert (diverged.regret, diverged.diverged) == (None, 1)
    assert "| infinite (1 of 3 rates failed) |" in to_markdown(report_of([task]))


def test_a_run_of_an_older_version_does_not_hide_what_the_others_serve(tmp_path: Path) -> None:
    runs = grid_of(tmp_path, ["lora", "lora-over"])
    outcomes = {run: made_up(run, MIDDLE[RATES.index(run.rate)]) for run in runs}
    for run in runs:
        if run.method == "lora-over" and run.seed > 0:
            outcomes[run] = outcomes[run].model_copy(update={"served_rank": 8, "served_bytes": 4096})
    (task,) = task_results(runs, outcomes, SEEDS)
    assert [(result.served_rank, result.served_bytes) for result in task.methods] == [(None, None), (8, 4096)]
    assert "| 8 | 4,096 |" in to_markdown(report_of([task]))


def test_outcomes_on_different_examples_are_not_compared(tmp_path: Path) -> None:
    runs = grid_of(tmp_path, ["lora", "lora-over"])
    outcomes = {run: made_up(run, 1.0) for run in runs}
    outcomes[runs[-1]] = outcomes[runs[-1]].model_copy(update={"tokens": [TOKENS] * (EXAMPLES - 1) + [TOKENS + 1]})
    with pytest.raises(LoraOverError, match="different held-out examples"):
        task_results(runs, outcomes, SEEDS)


def report_of(tasks: list[TaskResult]) -> StudyReport:
    return StudyReport(
        rule=RULE,
        is_whole=True,
        seeds=SEEDS,
        runs=0,
        tasks=tasks,
        words=words(tasks),
        command="",
        versions={},
        hardware="",
        date="",
    )
