"""The studies that the Makefile plans: what they compare, and what the docs report of their kept runs."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mode
from types import SimpleNamespace
from typing import Literal, TypeVar
from unittest.mock import Mock

import pytest
from transformers import TrainingArguments

from loraover.cli import cli
from loraover.common import command_line
from loraover.training.launch.defaults import LEARNING_RATES
from loraover.training.run.trainer import own_optimizer
from loraover_lab.study.analysis import Difference, Halves
from loraover_lab.study.grid import Run, grid_of
from loraover_lab.study.outcome import RunOutcome, digest, finished
from loraover_lab.study.report import StudyReport, TaskResult
from loraover_lab.study.request import StudyRequest
from loraover_lab.study.runner import make_report

from support.tiny_models import tiny_llama, with_lora

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "study"
RESEARCH = DOCS.parent / "research"
FOLDERS = {"study": "smollm2", "study-gauge": "gauge", "study-papers": "papers"}
Half = Literal["validation", "test"]
HALVES: tuple[Half, ...] = ("validation", "test")
STUDIES = [
    "study",
    "study-gauge",
    "study-papers",
    "study-ranks",
    *(f"study-gauge-{kind}" for kind in ("arms", "options", "steps", "long", "rates")),
]
ROUNDED = 1e-6  # nats are kept to six decimals, and the reports were made before they were rounded


Test = TypeVar("Test", bound=Callable[..., None])


def by_make(test: Test) -> Test:
    """Mark a test that asks the Makefile for a study."""
    marks = pytest.mark.process, pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
    for mark in marks:
        test = mark(test)
    return test


@cache
def planned(target: str) -> tuple[list[Run], int, list[Path]]:
    """All runs that a target of the Makefile asks for, its tuning seeds (0 for all), and the studies that it reuses."""
    dry = ["make", "--dry-run", "--no-print-directory", target]
    printed = subprocess.run(dry, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    (line,) = [line for line in printed.replace("\\\n", " ").splitlines() if "loraover study" in line]
    asked: list[StudyRequest] = []

    def keep(request: StudyRequest) -> SimpleNamespace:
        asked.append(request)
        return SimpleNamespace(exit_code=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraover_lab.study.runner.run_study", SimpleNamespace(__wrapped__=keep))
        patch.setattr("loraover_lab.study.show.show_study", Mock())
        patch.chdir(ROOT)
        assert command_line.run(cli, shlex.split(line)[1:]) == 0
        request = asked[0].whole()
        runs = grid_of(request)
    return runs, request.tuning_seeds or 0, [ROOT / study for study in request.reuse]


def kept(folder: str) -> StudyReport:
    return StudyReport.model_validate_json((DOCS / folder / "study.json").read_text())


def runs_of(target: str, folder: str) -> tuple[list[Run], dict[Run, RunOutcome]]:
    """All runs that a target plans, and the finished ones with their outcomes."""
    grid, _, reused = planned(target)
    return grid, finished(grid, DOCS / folder, reused)


def shown(task: TaskResult, difference: Difference) -> str:
    """A difference to the baseline and its interval, in per cent of the baseline."""
    (baseline,) = (one.test_loss for one in task.methods if one.method == task.baseline)
    mean, low, high = (_rounded(100 * value / baseline) for value in (difference.mean, *difference.interval))
    return f"{mean} % | {low} to {high} %"


def _rounded(value: float) -> str:
    return f"{value:+.1f}" if abs(value) < 10 else f"{value:+.0f}"


@by_make
@pytest.mark.parametrize("target", FOLDERS)
def test_the_kept_report_is_that_of_the_kept_runs(target: str) -> None:
    grid, outcomes = runs_of(target, FOLDERS[target])
    report = make_report(grid, outcomes, kept(FOLDERS[target]).rule, "", planned(target)[1] or None)
    assert report.is_whole
    for task, known_task in zip(report.tasks, kept(FOLDERS[target]).tasks, strict=True):
        assert task.baseline == known_task.baseline
        for result, known in zip(task.methods, known_task.methods, strict=True):
            assert (result.method, result.rate) == (known.method, known.rate)
            assert result.test_loss == pytest.approx(known.test_loss, abs=ROUNDED)
            if result.difference is not None and known.difference is not None:
                assert result.difference.interval == pytest.approx(known.difference.interval, abs=ROUNDED)


def test_the_docs_quote_the_study_of_mpo() -> None:
    quoted = (RESEARCH / "earlier-studies.md").read_text()
    for task in kept("smollm2").tasks:
        for result in task.methods:
            assert f"{result.test_loss:.4f} ({result.deviation:.4f})" in quoted
            if result.difference is not None:
                low, high = result.difference.interval
                assert f"{result.difference.mean:+.4f} [{low:+.4f}, {high:+.4f}]" in quoted


def test_the_docs_quote_the_study_of_eigen() -> None:
    quoted = (RESEARCH / "eigen.md").read_text()
    for task in kept("gauge").tasks:
        difference = task.methods[-1].difference
        assert difference is not None
        assert f"| {shown(task, difference)} |" in quoted
        for result in task.methods:
            assert f"{result.test_loss:.4f} ({result.deviation:.4f})" in quoted.replace("**", "")


@by_make
def test_the_docs_quote_the_options_of_eigen() -> None:
    quoted = (RESEARCH / "eigen.md").read_text()
    grid, found = runs_of("study-gauge-options", "gauge-options")
    losses = {run.method: loss_of(outcome, "validation") for run, outcome in found.items()}
    assert len(losses) == len(grid)
    plus, ours, *others = losses.values()
    assert f"| as in the study | {ours:.4f} | |" in quoted
    assert all(f"| {loss:.4f} | {100 * (loss / ours - 1):+.2f} % |" in quoted for loss in (*others, plus))
    assert min(others) > 0.999 * ours, "no other option is visibly better"


@by_make
def test_the_docs_quote_the_losses_by_rate() -> None:
    quoted = (RESEARCH / "eigen.md").read_text()
    losses: dict[str, dict[float, float]] = {}
    grid, outcomes = runs_of("study-gauge-rates", "gauge-rates")
    for run, found in outcomes.items():
        losses.setdefault(run.method, {})[run.rate] = loss_of(found, "validation")
    assert sum(map(len, losses.values())) == len(grid)
    for by_rate in losses.values():
        best = min(by_rate.values())
        cells = [f"{loss:.4f} ({100 * (loss / best - 1):+.1f} %)" for _, loss in sorted(by_rate.items())]
        assert f"| {' | '.join(cells).replace(' (+0.0 %)', '')} |" in quoted


@by_make
def test_the_docs_quote_the_arms_of_eigen() -> None:
    quoted = (RESEARCH / "eigen.md").read_text()
    grid, outcomes = runs_of("study-gauge-arms", "gauge-arms")
    arms: dict[str, dict[float, RunOutcome]] = {run.method: {} for run in grid}
    for run, found in outcomes.items():
        arms[run.method][run.rate] = found
    assert sum(map(len, arms.values())) == len(grid)
    for by_rate in arms.values():
        losses = {rate: loss_of(found, "validation") for rate, found in by_rate.items()}
        best = min(losses, key=losses.__getitem__)
        assert f"| {1e3 * best:g}e-3 | {losses[best]:.4f} | {loss_of(by_rate[best], 'test'):.4f} |" in quoted


@by_make
def test_the_docs_quote_the_losses_after_300_steps() -> None:
    quoted = (RESEARCH / "eigen.md").read_text()
    arms, long = (runs_of(f"study-gauge-{kind}", f"gauge-{kind}")[1] for kind in ("arms", "long"))
    short = {(run.method, run.rate, run.seed): found for run, found in arms.items()}
    assert long
    for run, after in long.items():
        before = short[run.method, run.rate, run.seed]
        cells = [f"{loss_of(found, half):.4f}" for half in HALVES for found in (before, after)]
        assert f"| {' | '.join(cells)} |" in quoted


@by_make
def test_one_rate_is_best_at_each_rank() -> None:
    """The default rate of plain LoRA names no rank; the docs quote the losses."""
    losses: dict[tuple[int, str], dict[float, float]] = {}
    for target, folder in (("study", "smollm2"), ("study-ranks", "ranks")):
        for run, found in runs_of(target, folder)[1].items():
            if run.recipe.method == "lora" and run.seed == 0 and run.task != "subj":
                losses.setdefault((run.recipe.lora.r, run.task), {})[run.rate] = loss_of(found, "validation")
    assert {(rank, len(rates)) for (rank, _), rates in losses.items()} == {(2, 3), (8, 3), (32, 3)}
    best = {(task, min(rates, key=rates.__getitem__)) for (_, task), rates in losses.items()}
    assert best == {("gsm8k", LEARNING_RATES["lora"]), ("qnli", 3e-4)}
    quoted = (RESEARCH / "earlier-studies.md").read_text()
    for rank in (2, 8, 32):
        cells = [f"{loss:.4f}" for task in ("gsm8k", "qnli") for _, loss in sorted(losses[rank, task].items())]
        assert f"| {rank} | {' | '.join(cells)} |" in quoted


def loss_of(outcome: RunOutcome, half: Half) -> float:
    rows: slice = getattr(Halves(len(outcome.tokens)), half)
    return sum(outcome.nats[rows]) / sum(outcome.tokens[rows])


def test_the_docs_quote_the_study_of_80_steps() -> None:
    quoted = (RESEARCH / "eigen.md").read_text()
    for task in kept("gauge-steps").tasks:
        plain, _, ours = task.methods
        assert ours.difference is not None
        assert task.baseline == plain.method
        losses = " | ".join(f"{result.test_loss:.4f} ({result.deviation:.4f})" for result in (plain, ours))
        assert f"| {losses} | {shown(task, ours.difference)} |" in quoted


def test_the_docs_quote_the_study_of_other_methods() -> None:
    quoted = (RESEARCH / "papers.md").read_text()
    (task,) = kept("papers").tasks
    for result in task.methods:
        difference = result.difference
        beside = "| |" if difference is None else f"{shown(task, difference)} | {difference.p:.2g}"
        assert result.served_bytes is not None
        numbers = f"{result.trained_parameters:,} | {result.served_rank} | {result.served_bytes / 1e6:.1f} |"
        assert f"| {result.test_loss:.4f} ({result.deviation:.4f}) | {beside} | {numbers}" in quoted


def test_default_rates_are_those_that_the_studies_chose_on_most_tasks() -> None:
    chosen: dict[str, list[float]] = {}
    for task in (task for folder in FOLDERS.values() for task in kept(folder).tasks):
        for result in task.methods:
            name = "lora+" if "loraplus_lr_ratio" in result.method else result.method.partition(":")[0]
            assert result.rate is not None
            chosen.setdefault(name, []).append(result.rate)
    assert {name: mode(rates) for name, rates in chosen.items()} | {"full": LEARNING_RATES["full"]} == LEARNING_RATES
    quoted = (DOCS.parent / "recipes.md").read_text()
    assert all(f"| `{name}` | {rate:g} |" in quoted for name, rate in LEARNING_RATES.items())


@by_make
def test_the_study_of_other_methods_takes_the_runs_of_the_gauges_as_they_are() -> None:
    (gauge, tuning, _), (papers, same, _) = (planned(name) for name in ("study-gauge", "study-papers"))
    assert (tuning, same) == (1, 1)  # or the further seeds would be trained at other rates
    known = {one.folder: digest(one.recipe) for one in gauge}
    shared = [one for one in papers if one.folder in known]
    assert all(digest(one.recipe) == known[one.folder] for one in shared)
    methods = {one.method: one.recipe.method for one in papers}
    taken = {one.method for one in shared}
    assert [methods[method] for method in methods if method in taken] == ["lora", "lora", "lora-over"]
    others = [methods[method] for method in methods if method not in taken]
    assert others == ["lora-over", "tensorguide", "soma", "lorasc", "federated"]
    rates = {method: len({one.rate for one in papers if one.method == method}) for method in methods}
    federated = next(name for name in methods if methods[name] == "federated")
    grown = [rates.pop(name) for name in ("lora-over", "tensorguide", "soma", federated)]
    assert grown == [4, 4, 4, 5]  # the largest of 3 was best, and federated's largest of 4 too
    assert set(rates.values()) == {3}
    assert len(shared) == 3 * 3 * 3


@by_make
@pytest.mark.parametrize(
    ("target", "shared", "new"),
    [
        ("study-gauge-arms", 3 * 3 + 4, 7 * 3 + 1),
        ("study-gauge-options", 2, 8),
        ("study-gauge-steps", 4 * 2 * 3 + 8, 4 * 3 + 1),
        ("study-gauge-long", 0, 3),
        ("study-gauge-rates", 3 * 3, 3 * 2),
    ],
)
def test_a_further_study_of_the_gauge_takes_the_runs_that_are_the_same(target: str, shared: int, new: int) -> None:
    (gauge, tuning, _), (papers, *_), (further, same, _) = (
        planned(name) for name in ("study-gauge", "study-papers", target)
    )
    known = {(one.folder, digest(one.recipe)) for one in (*gauge, *papers)}
    sweep = [(one.folder, digest(one.recipe)) in known for one in further if one.seed == 0]
    assert (tuning, same) == (1, 1)
    assert (sum(sweep), len(sweep)) == (shared, shared + new)


@by_make
@pytest.mark.parametrize("target", STUDIES)
def test_every_method_has_an_optimizer_that_takes_its_settings(target: str) -> None:
    for recipe in {run.method: run.recipe for run in planned(target)[0]}.values():
        if recipe.training.optim == "soap":
            pytest.importorskip("pytorch_optimizer", reason="the extra soap is not installed")
        if (make := own_optimizer(recipe, TrainingArguments())) is not None:
            make(with_lora(tiny_llama()))


@by_make
def test_federated_keeps_to_its_budget_and_to_the_rows_of_the_others() -> None:
    federated = pytest.importorskip("loraover_lab.methods.federated", reason="the extra private is not installed")
    pytest.importorskip("opacus", reason="the extra private is not installed")
    runs, *_ = planned("study-papers")
    one = next(one.recipe for one in runs if one.recipe.method == "federated")
    batch, plain = one.training.per_device_train_batch_size, runs[0].recipe.training
    assert batch * one.settings.clients == plain.per_device_train_batch_size
    federated.Federated(one).check(plain.max_steps, 1979)
    assert one.settings.epsilon == 8.0
