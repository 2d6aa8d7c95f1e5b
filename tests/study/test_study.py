"""`loraover study` on a tiny model: killed, resumed, reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from loraover.cli import _sweeps, cli
from loraover.command import run
from loraover.recipe import load_recipe
from loraover.study.grid import make_grid, matched_rank
from loraover.study.outcome import OUTCOME_FILE
from loraover.study.report import StudyReport

from tiny_hub import save_llama, write_recipe

RATES = "1e-3,1e-2"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    evaluation = {"examples": 12, "exact_match": False}
    return write_recipe(folder / "words.yaml", save_llama(folder / "llama"), evaluation=evaluation)


def words(recipe: Path, out: Path, *more: str) -> list[str]:
    return ["study", str(recipe), "--seeds", "2", "--lr-sweep", RATES, "--jobs", "2", "-o", str(out), *more]


def report_of(out: Path) -> StudyReport:
    return StudyReport.model_validate_json((out / "study.json").read_text())


@pytest.fixture(scope="module")
def killed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was killed after its third run, and then finished."""
    out = tmp_path_factory.mktemp("killed") / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "loraover.cli", *words(recipe, out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while len(list(out.rglob(OUTCOME_FILE))) < 3:
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in out.rglob(OUTCOME_FILE)}
    assert run(cli, words(recipe, out)) == 0
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    return out


def test_a_study_that_was_killed_is_finished(killed: Path) -> None:
    report = report_of(killed)
    assert (report.is_whole, report.seeds, report.runs) == (True, 2, 8)
    (task,) = report.tasks
    assert (task.task, task.baseline, task.failures) == ("words", "lora", [])
    lora, over = task.methods
    assert (lora.method, lora.difference) == ("lora", None)
    assert over.difference is not None
    assert over.trained_parameters > lora.trained_parameters == over.served_parameters
    assert over.fold_error is not None
    assert 0 < over.fold_error < 1e-6
    assert over.step_norm is not None
    assert over.peak_bytes > 2**27
    (line,) = report.words
    assert line.startswith("words: lora-over ")


def test_the_report_can_be_made_again_and_is_the_same(killed: Path, recipe: Path) -> None:
    before = report_of(killed)
    assert run(cli, words(recipe, killed, "--report-only")) == 0
    assert report_of(killed).tasks == before.tasks
    table = (killed / "study.md").read_text()
    assert table.count("| lora") == 2
    page = (killed / "study.html").read_text()
    assert "<svg" in page
    assert "<script" not in page


def test_another_recipe_is_not_mixed_in(killed: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, words(recipe, killed, "--set", "lora.r=2")) == 2
    assert "another recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "lora,galore"], "'galore' is none of"),
        (["--methods", "lora-over:decomposition"], "expected key=value"),
        (["--methods", "lora-over:decompositoin=svd"], "did you mean 'decomposition'"),
        (["--lr-sweep", "1e-3,1e-3"], "different positive numbers"),
        (["--lr-sweep", "fast"], "different positive numbers"),
        (["--lr-sweep", "dora=1e-3"], "'dora', which is none of --methods"),
        (["--report-only"], "nothing to compare"),
    ],
)
def test_what_is_no_study_is_refused(
    more: list[str], message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, words(recipe, tmp_path / "out", *more)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.rglob(OUTCOME_FILE))


def test_a_run_that_diverges_is_worse_than_any_other(recipe: Path, tmp_path: Path) -> None:
    more = ["--methods", "lora", "--lr-sweep", "1e-3,1e30", "--seeds", "1"]
    assert run(cli, words(recipe, tmp_path / "out", *more)) == 0
    (task,) = report_of(tmp_path / "out").tasks
    assert task.methods[0].rate == 1e-3
    (failure,) = task.failures
    assert failure.endswith("training diverged")


def test_every_method_makes_a_recipe(recipe: Path) -> None:
    methods = ["lora", "rslora", "dora", "pissa", "lora+", "lora-matched", "full", "lora-over:decomposition=svd"]
    grid = make_grid([str(recipe)], {method: [1e-3] for method in methods}, 1, {})
    by_method = {found.method: found.recipe for found in grid}
    assert by_method["dora"].lora.use_dora
    assert by_method["lora+"].training.loraplus_lr_ratio == 16
    assert by_method["lora-over:decomposition=svd"].over.decomposition == "svd"
    assert by_method["lora-matched"].lora.r == matched_rank(load_recipe(str(recipe))) > 4
    assert len({found.folder for found in grid}) == len(methods)


def test_seeds_come_one_after_the_other(recipe: Path) -> None:
    seeds = [found.seed for found in make_grid([str(recipe)], {"lora": [1e-3, 1e-2], "lora-over": [1e-4]}, 3, {})]
    assert seeds == sorted(seeds)


def test_a_method_may_have_a_sweep_of_its_own() -> None:
    svd = "lora-over:decomposition=svd"
    assert _sweeps(["lora", svd], ("1e-3,1e-2", f"{svd}=1e-4,3e-4")) == {"lora": (1e-3, 1e-2), svd: (1e-4, 3e-4)}
    with pytest.raises(click.UsageError, match="no rates of 'lora'"):
        _sweeps(["lora", svd], (f"{svd}=1e-4",))


@pytest.mark.parametrize("method", ["dora", "pissa", "lora+", "full"])
def test_the_other_methods_train(method: str, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (found,) = make_grid([str(recipe)], {method: [1e-3]}, 1, {"training.max_steps": 2})
    settings = tmp_path / "recipe.yaml"
    settings.write_text(json.dumps(found.recipe.model_dump(mode="json")))
    assert run(cli, ["train", str(settings), "-o", str(folder)]) == 0
    assert (folder / ("model" if method == "full" else "adapter")).is_dir()


def test_ray_runs_a_study(recipe: Path, tmp_path: Path) -> None:
    more = ["--ray", "local", "--lr-sweep", "1e-2", "--seeds", "1"]
    assert run(cli, words(recipe, tmp_path / "out", *more)) == 0
    assert report_of(tmp_path / "out").runs == 2
