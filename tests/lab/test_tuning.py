"""Rates that some seeds choose, and the runs that follow from the choice; losses are made up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from loraover.common.errors import LoraOverError
from loraover.common.reporter import SILENT, Reporter
from loraover.training.recipe import Recipe
from loraover_lab.study import runner
from loraover_lab.study.analysis import Halves
from loraover_lab.study.grid import Run
from loraover_lab.study.outcome import DIVERGED, RunOutcome, digest, finished, keep
from loraover_lab.study.report import Rule, StudyReport
from loraover_lab.study.request import StudyRequest
from loraover_lab.study.runner import make_report, run_grid
from loraover_lab.study.show import to_markdown, to_page
from loraover_lab.study.tuning import hours_left, plan_runs
from loraover_lab.study.verdict import verdict_of

from support.lines import Lines
from support.study_grid import make_grid
from support.tiny_hub import write_recipe

RATES = (1e-4, 1e-3, 1e-2)
METHODS = ("lora", "lora-over", "lora:r=16")
RULER = "lora:r=16"
SEEDS, TUNING = 5, 2
RULE = Rule(required=2, tasks=2, finished_before=0)
EXAMPLES, TOKENS = 40, 20
BEST = {"lora": 1e-3, "lora-over": 1e-2, RULER: 1e-4}
Loss = Callable[[str, float, int], float | None]


@pytest.fixture
def grid(tmp_path: Path) -> list[Run]:
    recipes = [str(write_recipe(tmp_path / f"task{i}.yaml", "none", evaluation={"examples": 12})) for i in range(2)]
    return make_grid(recipes, dict.fromkeys(METHODS, RATES), SEEDS, {}, rulers=(RULER,))


def loss_of(method: str, rate: float, seed: int) -> float | None:
    """Lowest at each method's best rate for the tuning seeds; the others would choose another."""
    lowest = {"lora": 1.0, "lora-over": 0.9, RULER: 0.5}[method]
    return lowest + (0.2 if (rate == BEST[method]) == (seed >= TUNING) else 0.0)


def outcome_of(run: Run, loss: Loss) -> RunOutcome:
    """Validation loss as given; the test loss is 1 higher."""
    found = loss(run.method, run.rate, run.seed)
    if found is None:
        return RunOutcome(recipe=digest(run.recipe), failure=DIVERGED)
    noise = np.random.default_rng([run.seed, METHODS.index(run.method)]).normal(0, 0.01, EXAMPLES)
    nats = found + noise
    nats[Halves(EXAMPLES).test] += 1
    return RunOutcome(recipe=digest(run.recipe), nats=(TOKENS * nats).tolist(), tokens=[TOKENS] * EXAMPLES)


class Machine:
    """Stand-in for training processes: notes the runs, and is switched off after some of them."""

    def __init__(self, grid: list[Run], folder: Path, loss: Loss = loss_of) -> None:
        self.runs = {folder / run.folder: run for run in grid}
        self.loss = loss
        self.trained: list[Run] = []
        self.lasts = len(grid)

    def execute(self, recipe: Recipe, folder: Path, threads: int) -> RunOutcome:
        if len(self.trained) == self.lasts:
            raise KeyboardInterrupt
        run = self.runs[folder]
        self.trained.append(run)
        return outcome_of(run, self.loss)


@pytest.fixture
def machine(grid: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(grid, tmp_path / "out")
    monkeypatch.setattr(runner, "execute", made.execute)
    return made


def study(grid: list[Run], folder: Path, report: Reporter = SILENT, tuning: int | None = TUNING) -> StudyReport:
    request = StudyRequest(["demo"], folder, seeds=SEEDS, tuning_seeds=tuning, report=report)
    return make_report(grid, run_grid(grid, request), RULE, "", tuning)


def test_further_seeds_are_trained_at_the_chosen_rate_only(grid: list[Run], machine: Machine, tmp_path: Path) -> None:
    report = study(grid, tmp_path / "out")
    assert machine.trained[: 2 * len(METHODS) * len(RATES) * TUNING] == [run for run in grid if run.seed < TUNING]
    assert [(run.task, run.method, run.rate, run.seed) for run in machine.trained if run.seed >= TUNING] == [
        (task, method, BEST[method], seed)
        for seed in range(TUNING, SEEDS)
        for task in ("task0", "task1")
        for method in METHODS
    ]
    assert (report.is_whole, report.seeds, report.tuning_seeds, report.runs) == (True, SEEDS, TUNING, 54)
    assert "20 test examples, 5 seeds, the first 2 of which chose the rates." in to_markdown(report)
    assert "5 seeds, the first 2 of which chose the rates; 54 runs" in to_page(report).html


def test_all_seeds_judge_and_the_tuning_seeds_show_the_rates(grid: list[Run], machine: Machine, tmp_path: Path) -> None:
    """The further seeds are 0.2 worse at the chosen rate, which the validation losses do not show."""
    for task in study(grid, tmp_path / "out").tasks:
        lora, over, _ = task.methods
        assert (lora.rate, over.rate, task.baseline) == (1e-3, 1e-2, "lora")
        assert lora.sensitivity.losses == pytest.approx({"0.0001": 1.2, "0.001": 1.0, "0.01": 1.2}, abs=0.01)
        assert lora.test_loss == pytest.approx(2 + 0.2 * (SEEDS - TUNING) / SEEDS, abs=0.01)
        assert over.difference is not None
        assert over.difference.mean == pytest.approx(-0.1, abs=0.01)
        assert over.difference.interval[1] < 0


def test_runs_with_other_rows_are_not_compared(grid: list[Run]) -> None:
    """Neither with other held-out rows, nor with other training rows of one seed; older outcomes do not say theirs."""
    outcomes = {run: outcome_of(run, loss_of) for run in grid}
    one, other = (run for run in grid if (run.task, run.rate, run.seed) == ("task0", 1e-3, 0) and run.method != RULER)

    def judged(**rows: str) -> None:
        outcomes[one] = outcomes[one].model_copy(update={"test_rows": "a", "train_rows": "b"})
        outcomes[other] = outcomes[one].model_copy(update=rows)
        make_report(grid, outcomes, RULE, "")

    judged()
    with pytest.raises(LoraOverError, match=r"lora-over.*had different held-out rows.*were the data changed"):
        judged(test_rows="c")
    with pytest.raises(LoraOverError, match="had different training rows"):
        judged(train_rows="c")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model_revision", r"had different commits of the base model .* name one of them as model_rev"),
        ("started_from", r"had different adapters to start from.*was lora\.start_from trained anew"),
    ],
)
def test_runs_on_other_models_and_from_other_adapters_are_not_compared(key: str, message: str, grid: list[Run]) -> None:
    outcomes = {run: outcome_of(run, loss_of) for run in grid}
    one, other = grid[0], grid[-1]
    outcomes[one] = outcomes[one].model_copy(update={key: "a"})
    outcomes[other] = outcomes[other].model_copy(update={key: "a"})
    make_report(grid, outcomes, RULE, "")
    outcomes[other] = outcomes[other].model_copy(update={key: "b"})
    with pytest.raises(LoraOverError, match=message):
        make_report(grid, outcomes, RULE, "")


@pytest.mark.parametrize("lasts", [7, 36, 41])
def test_a_study_that_was_stopped_continues_in_either_stage(
    lasts: int, grid: list[Run], machine: Machine, tmp_path: Path
) -> None:
    machine.lasts = lasts
    with pytest.raises(KeyboardInterrupt):
        study(grid, tmp_path / "out")
    machine.lasts = len(grid)
    report = study(grid, tmp_path / "out")
    assert len(machine.trained) == len(set(machine.trained)) == 54
    assert report == make_report(grid, {run: outcome_of(run, loss_of) for run in machine.trained}, RULE, "", TUNING)


@pytest.mark.parametrize(("lasts", "seeds", "tuning"), [(18, 1, None), (40, 2, None), (49, 4, 2)])
def test_what_is_finished_is_judged(
    lasts: int, seeds: int, tuning: int | None, grid: list[Run], machine: Machine, tmp_path: Path
) -> None:
    machine.lasts = lasts
    with pytest.raises(KeyboardInterrupt):
        study(grid, tmp_path / "out")
    report = make_report(grid, finished(grid, tmp_path / "out"), RULE, "", TUNING)
    assert (report.is_whole, report.seeds, report.tuning_seeds, report.runs) == (False, seeds, tuning, lasts)
    assert [result.rate for result in report.tasks[0].methods] == [BEST[method] for method in METHODS]


def test_a_chosen_rate_that_fails_later_gives_way_to_the_next(
    grid: list[Run], machine: Machine, tmp_path: Path
) -> None:
    def loss(method: str, rate: float, seed: int) -> float | None:
        if method == "lora-over":
            return None if (rate, seed) == (1e-2, 3) else {1e-4: 1.3, 1e-3: 1.1, 1e-2: 0.9}[rate]
        return loss_of(method, rate, seed)

    machine.loss = loss
    report = study(grid, tmp_path / "out")
    over = report.tasks[0].methods[1]
    assert (report.is_whole, report.seeds, over.rate, over.sensitivity.diverged) == (True, SEEDS, 1e-3, 1)
    assert over.test_loss == pytest.approx(2.1, abs=0.01)
    assert [failure.endswith("lr-0.01/seed-3: training diverged") for failure in report.tasks[0].failures] == [True]
    for stop in (TUNING, 3):  # before the next best rate has further seeds, and when it has one of them
        known = {
            run: outcome_of(run, loss) for run in machine.trained if run.seed < stop or run.rate == BEST[run.method]
        }
        partial = make_report(grid, known, RULE, "", TUNING)
        assert (partial.is_whole, partial.seeds, partial.tasks[0].methods[1].rate) == (False, stop, 1e-3)


def test_a_method_that_fails_at_every_rate_has_no_further_runs(
    grid: list[Run], machine: Machine, tmp_path: Path
) -> None:
    machine.loss = lambda method, rate, seed: None if method == "lora-over" else loss_of(method, rate, seed)
    report = study(grid, tmp_path / "out")
    assert max(run.seed for run in machine.trained if run.method == "lora-over") == TUNING - 1
    assert (report.is_whole, report.seeds, report.tasks[0].failed) == (True, SEEDS, ["lora-over"])


def test_examples_that_change_between_runs_are_noticed_before_a_choice(grid: list[Run]) -> None:
    outcomes = {run: outcome_of(run, loss_of) for run in grid if run.seed < TUNING}
    last = max(outcomes, key=grid.index)
    outcomes[last] = outcomes[last].model_copy(update={"tokens": [TOKENS] * (EXAMPLES - 1) + [TOKENS + 1]})
    with pytest.raises(LoraOverError, match="different held-out examples"):
        plan_runs(grid, outcomes, TUNING)


def test_a_ruler_is_shown_and_neither_a_baseline_nor_in_the_verdict(
    grid: list[Run], machine: Machine, tmp_path: Path
) -> None:
    """Its loss is the lowest of all, and it is a plain LoRA."""
    report = study(grid, tmp_path / "out")
    (task, _), ruler = report.tasks, report.tasks[0].methods[2]
    assert (task.baseline, task.rulers, ruler.method) == ("lora", [RULER], RULER)
    assert ruler.difference is not None
    assert ruler.difference.mean == pytest.approx(-0.5, abs=0.01)
    assert not any(RULER in line for line in report.words)
    assert verdict_of(report).word == "better"
    assert f"| {RULER} (ruler) |" in to_markdown(report)
    assert f"{RULER} (ruler)" in to_page(report).html


def test_a_ruler_of_lora_over_decides_nothing(tmp_path: Path) -> None:
    ruler = "lora-over:aux_lr_scale=0.5"
    recipe = str(write_recipe(tmp_path / "task.yaml", "none", evaluation={"examples": 12}))
    runs = make_grid([recipe], dict.fromkeys(("lora", "lora-over", ruler), RATES), 2, {}, rulers=(ruler,))
    even = {run: outcome_of(run, lambda *_: 1.0) for run in runs if run.method != ruler}
    better = {run: RunOutcome(recipe="", nats=[1.0] * EXAMPLES, tokens=[TOKENS] * EXAMPLES) for run in runs}
    for rulers in (better, dict.fromkeys(runs, RunOutcome(recipe="", failure=DIVERGED))):
        verdict = verdict_of(make_report(runs, rulers | even, RULE, ""))
        assert verdict.word == "cannot be told apart"
        assert ruler not in verdict.sentence


def test_the_number_of_runs_comes_first_and_the_hours_with_each_run(
    grid: list[Run], machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**6, 3600))  # it is read before and after each run
    monkeypatch.setattr(runner, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    shown = Lines()
    study(grid, tmp_path / "out", shown)
    assert shown.lines[0] == "54 runs to do, 0 finished already"
    assert shown.lines[1].startswith("1/54 task0, lora, rate 0.0001, seed 0: validation loss 1.1973")
    assert shown.lines[1].endswith("; about 53.0 h left")
    assert shown.lines[2].endswith("; about 52.0 h left")
    assert shown.lines[-1].startswith("54/54 task1, lora:r=16, rate 0.0001, seed 4: validation loss")
    assert "left" not in shown.lines[-1]
    again = Lines()
    study(grid, tmp_path / "out", again)
    assert again.lines == ["0 runs to do, 54 finished already"]


def test_a_study_that_goes_on_begins_with_its_hours(grid: list[Run], machine: Machine, tmp_path: Path) -> None:
    outcome = outcome_of(grid[0], loss_of).model_copy(update={"step_seconds": 900.0})  # of four steps
    keep(tmp_path / "out", {grid[0]: outcome})
    shown = Lines()
    study(grid, tmp_path / "out", shown)
    assert shown.lines[0] == "53 runs to do, 1 finished already; about 53.0 h left"


def test_hours_are_those_of_each_task_and_of_all_jobs() -> None:
    assert hours_left({"a": 3}, {}, jobs=2) is None
    assert hours_left({"a": 3, "b": 4}, {"a": [3600.0, 7200.0, 36000.0]}, jobs=2) == pytest.approx(7)
    assert hours_left({"a": 3, "b": 4}, {"a": [7200.0], "b": [3600.0]}, jobs=2) == pytest.approx(5)


def test_without_tuning_seeds_every_seed_has_every_rate(grid: list[Run]) -> None:
    for tuning in (None, SEEDS):
        plan = plan_runs(grid, {}, tuning)
        assert (plan.runs, plan.total) == (grid, len(grid))


def test_the_command_line_names_both() -> None:
    tuned = StudyRequest("demo", "out", methods="lora", lr_sweep=(1e-3,), seeds=5, tuning_seeds=2)
    request = replace(tuned, rulers=(RULER, "dora"), settings={"lora.r": 2})
    expected = "loraover study demo -o out --methods lora --lr-sweep 0.001 --seeds 5 --tuning-seeds 2"
    assert request.command() == f"{expected} --ruler lora:r=16 --ruler dora --set lora.r=2"
