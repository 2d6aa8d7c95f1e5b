"""`loraover study` on a tiny model: killed, resumed, reported."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import loraover_lab
from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import ConfigError
from loraover.training.run_result import read_run
from loraover_lab.study.outcome import KEPT_FILE, RunOutcome, read_kept
from loraover_lab.study.report import StudyReport
from loraover_lab.study.request import StudyRequest
from loraover_lab.study.runner import run_grid

from support.children import Child
from support.study_grid import make_grid
from support.train_command import data_file

pytestmark = pytest.mark.process


RATES = "1e-3,1e-2"


METHODS = ["--methods", "lora,lora-over"]


def words(recipe: Path, out: Path, *more: str) -> list[str]:
    sweep = [] if "--lr-sweep" in more else ["--lr-sweep", RATES]
    methods = [] if "--methods" in more else METHODS
    return ["study", str(recipe), *methods, "--seeds", "2", *sweep, "--jobs", "2", "-o", str(out), *more]


def report_of(out: Path) -> StudyReport:
    return StudyReport.model_validate_json((out / "study.json").read_text())


@pytest.fixture(scope="module")
def killed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was killed after its third run, and then finished."""
    out = tmp_path_factory.mktemp("killed") / "out"
    child = Child(lambda: run(cli, words(recipe, out)), prepare=os.setsid)
    deadline = time.monotonic() + 120
    while len(read_kept(out)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    assert child.end().code == -signal.SIGKILL
    before = read_kept(out)
    assert run(cli, words(recipe, out)) == 0
    assert [one for one in read_kept(out) if one in before] == before  # step times and all: not trained again
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
    assert over.peak_bytes is not None
    assert over.peak_bytes > 2**27
    assert report.words[0].startswith("words: lora-over's loss is lower ")


def test_the_report_can_be_made_again_and_is_the_same(killed: Path, recipe: Path) -> None:
    before = report_of(killed)
    assert run(cli, words(recipe, killed, "--report-only")) == 0
    assert report_of(killed).tasks == before.tasks
    table = (killed / "study.md").read_text()
    assert table.count("| lora") == 4, "a row of losses and one of costs"
    page = (killed / "study.html").read_text()
    assert "<svg" in page
    assert "<script" not in page


def test_the_function_prints_nothing_and_returns_the_report(
    killed: Path, recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    found = loraover_lab.run_study([recipe], killed, methods=["lora", "lora-over"], lr_sweep=(1e-3, 1e-2), seeds=2)
    assert capfd.readouterr() == ("", "")
    assert found == report_of(killed)
    sweep = "--methods lora,lora-over --lr-sweep 0.001,0.01 --seeds 2"
    assert found.command == f"loraover study {recipe} -o {killed} {sweep}"
    with pytest.raises(ConfigError, match="expected 1 or more"):
        loraover_lab.run_study([recipe], killed, seeds=0)
    with pytest.raises(ConfigError, match="jobs is 0"):
        loraover_lab.run_study([recipe], killed, jobs=0)


def test_runs_of_another_study_are_taken_where_the_recipe_is_the_same(
    killed: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = words(recipe, tmp_path / "out", "--reuse", str(killed), "--report-only")
    assert run(cli, asked) == 0
    assert report_of(tmp_path / "out").tasks == report_of(killed).tasks
    assert not (tmp_path / "out" / KEPT_FILE).exists()  # it stays where it was made
    assert run(cli, [*asked, "--set", "lora.r=2"]) == 2  # none is the same
    assert run(cli, words(recipe, tmp_path / "out", "--reuse", str(tmp_path))) == 2
    assert "expected the folder of a study with finished runs" in " ".join(capsys.readouterr().err.split())


def test_another_recipe_is_not_mixed_in(killed: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, words(recipe, killed, "--set", "lora.r=2")) == 2
    assert "another recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lr-sweep", "dora=1e-3"], "'dora', which is none of --methods"),
        (["--report-only"], "nothing to compare"),
    ],
)
def test_what_is_no_study_is_refused(
    more: list[str], message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, words(recipe, tmp_path / "out", *more)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.rglob(KEPT_FILE))


def test_held_out_examples_of_all_tasks_are_counted_before_the_first_run(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = data_file(tmp_path / "rows.jsonl", *({"prompt": f"{n}+1?", "completion": f" {n + 1}"} for n in range(60)))
    values = yaml.safe_load(recipe.read_text()) | {"data": {"train": str(rows)}}
    (small := tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    assert run(cli, words(recipe, tmp_path / "out", str(small))) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert (
        f"{rows}: has 3 held-out examples, and a study takes 4 or more. Name others with --set data.test=FILE" in error
    )
    assert not list(tmp_path.rglob("*.lock"))


def test_a_run_that_diverges_is_worse_than_any_other(recipe: Path, tmp_path: Path) -> None:
    more = ["--lr-sweep", "1e-3,1e30", "--seeds", "1"]
    assert run(cli, words(recipe, tmp_path / "out", *more)) == 0
    (task,) = report_of(tmp_path / "out").tasks
    assert [method.rate for method in task.methods] == [1e-3, 1e-3]
    assert [failure.endswith("training diverged") for failure in task.failures] == [True, True]


def test_a_study_with_tuning_seeds_and_a_ruler_trains(recipe: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "out", ["--tuning-seeds", "1", "--ruler", "lora:r=2", "--set", "training.max_steps=2"]
    assert run(cli, words(recipe, out, *more)) == 0
    report = report_of(out)
    assert (report.is_whole, report.seeds, report.tuning_seeds, report.runs) == (True, 2, 1, 9)
    (task,) = report.tasks
    assert (task.baseline, task.rulers) == ("lora", ["lora:r=2"])
    before = read_kept(out)
    assert run(cli, words(recipe, out, *more)) == 0
    assert read_kept(out) == before
    assert report_of(out).tasks == report.tasks


@pytest.mark.parametrize("place", ["{recipe}", "{recipe}/below"])
def test_a_study_without_a_place_is_refused(
    place: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = recipe.read_bytes()
    assert run(cli, words(recipe, Path(place.format(recipe=recipe)))) == 2
    assert "cannot write" in capsys.readouterr().err
    assert recipe.read_bytes() == before


@pytest.mark.parametrize("method", ["dora", "pissa", "full"])
def test_the_other_methods_train(method: str, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    _, found = make_grid(
        [str(recipe)], {"lora": [1e-3], method: [1e-3]}, 1, {"training.max_steps": 2, "diagnostics": True}
    )
    settings = tmp_path / "recipe.yaml"
    settings.write_text(json.dumps(found.recipe.model_dump(mode="json")))
    assert run(cli, ["train", str(settings), "-o", str(folder)]) == 0
    card = (folder / ("model" if method == "full" else "adapter") / "README.md").read_text()
    said = {"dora": "A DoRA adapter of", "full": "A fine-tuned copy of"}
    assert said.get(method, "A plain LoRA adapter of") in card
    assert f"library_name: {'transformers' if method == 'full' else 'peft'}" in card
    norm, logged = read_run(folder).update_norm, (folder / "metrics.jsonl").read_text()
    if method in ("dora", "full"):  # which train more than B A
        assert norm is None
        assert "step_norm" not in logged
    else:
        assert norm is not None
        assert 0 < norm < (0.2 if method == "pissa" else 2)  # of two steps, without the B A that PiSSA begins with
        assert "step_norm" in logged


@pytest.mark.parametrize(("resources", "gpus"), [({"CPU": 2.0}, 0), ({"CPU": 2.0, "GPU": 1.0}, 1)])
def test_a_run_reserves_a_gpu_where_a_cluster_has_any(
    resources: dict[str, float], gpus: int, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster that only notes what it is asked for."""
    reserved: list[dict[str, int]] = []
    outcome = RunOutcome(recipe="", nats=[1.0], tokens=[1]).model_dump_json()

    def remote(**options: int) -> Callable[[object], SimpleNamespace]:
        reserved.append(options)
        return lambda work: SimpleNamespace(remote=lambda recipe: object())

    cluster = SimpleNamespace(
        init=lambda **_: None,
        shutdown=lambda: None,
        cluster_resources=lambda: resources,
        remote=remote,
        wait=lambda waiting, num_returns: (waiting[:1], waiting[1:]),
        get=lambda done: outcome,
    )
    monkeypatch.setitem(sys.modules, "ray", cluster)
    grid = make_grid([str(recipe)], {"lora": [1e-3, 1e-2]}, 1, {})
    found = run_grid(grid, StudyRequest([recipe], tmp_path, ray="local"))
    assert len(found) == 2
    assert reserved == [{"num_cpus": 1, "num_gpus": gpus}]


@pytest.mark.matrix
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers take two cores")
def test_two_workers_of_ray_run_a_study(recipe: Path, tmp_path: Path) -> None:
    more = ["--ray", "local", "--lr-sweep", "1e-2", "--seeds", "1"]
    assert run(cli, words(recipe, tmp_path / "out", *more)) == 0
    assert report_of(tmp_path / "out").runs == 2
    outcomes = read_kept(tmp_path / "out")
    assert None not in {found.worker for found in outcomes}
    assert len({found.worker for found in outcomes}) == 2
