"""The registered replication of `eigen`, evaluated on drawn losses whose truth is known."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from loraover.common.errors import LoraOverError
from loraover_lab.study.grid import Run
from loraover_lab.study.outcome import RunOutcome, digest, keep, read_kept

STUDY = Path(__file__).parents[2] / "docs" / "study"
REGISTRATION = (STUDY / "replication.yaml").read_bytes()
PLAN = yaml.safe_load(REGISTRATION)
TASKS = [task["name"] for task in PLAN["tasks"]]
ROWS = 600
TOKENS = np.random.default_rng(0).integers(20, 90, ROWS)
BETTER = dict.fromkeys(TASKS, -1.0)
THEN, OTHERWISE = PLAN["rule"]["then"], PLAN["rule"]["otherwise"]


@pytest.fixture(scope="module")
def replication() -> ModuleType:
    spec = importlib.util.spec_from_file_location("replication", STUDY / "replication.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(runs: Sequence[Run], effects: dict[str, float], noise: dict[str, float]) -> dict[Run, RunOutcome]:
    """Outcomes of runs whose methods differ by an effect on each task, in per cent, with noise of seeds and rows."""
    outcomes = {}
    for run in runs:
        of = TASKS.index(run.task), len(run.method)
        effect = effects[run.task] / 100 if run.method == "eigen" else 0.0
        effect += np.random.default_rng([run.seed, *of]).normal(0, 0.0004)
        nats = TOKENS * (1 + effect + np.random.default_rng(of).normal(0, noise.get(run.task, 0.015), ROWS))
        outcomes[run] = RunOutcome(recipe=digest(run.recipe), nats=nats.tolist(), tokens=TOKENS.tolist())
    return outcomes


def evaluated(
    replication: ModuleType, folder: Path, effects: dict[str, float], noise: dict[str, float], seeds: list[int]
) -> dict[str, Any]:
    """The report on drawn runs of both methods."""
    keep(folder, drawn(replication.runs_of(PLAN, seeds, TASKS), effects, noise))
    found: dict[str, Any] = replication.report(PLAN, folder, REGISTRATION)
    return found


@pytest.mark.parametrize(
    ("effects", "noise", "better", "sentence"),
    [
        (BETTER, {}, ["gsm8k", "mbpp", "mnli"], THEN),
        (BETTER, {"mnli": 0.5}, ["gsm8k", "mbpp"], THEN),
        (BETTER, {"mnli": 0.5, "mbpp": 0.5}, ["gsm8k"], OTHERWISE),
        (BETTER | {"gsm8k-300": 0.0, "mnli": 0.0}, {}, ["mbpp"], OTHERWISE),
        (BETTER | {"mbpp": 1.0}, {}, ["gsm8k", "mnli"], THEN),
    ],
    ids=["all", "one too wide", "two too wide", "gsm8k at 100 steps only", "worse on one"],
)
def test_the_rule_is_applied(
    replication: ModuleType,
    effects: dict[str, float],
    noise: dict[str, float],
    better: list[str],
    sentence: str,
    tmp_path: Path,
) -> None:
    found = evaluated(replication, tmp_path, effects, noise, PLAN["seeds"])
    assert found["verdict"] == {"better": better, "undecided": [], "required": 2, "sentence": sentence}
    assert [name for name, task in found["tasks"].items() if "stopped" in task] == [n for n in TASKS if n in noise]


def test_a_pilot_decides_what_it_can(replication: ModuleType, tmp_path: Path) -> None:
    wide = evaluated(replication, tmp_path / "wide", BETTER, dict.fromkeys(TASKS, 0.5), PLAN["pilot_seeds"])
    assert wide["verdict"]["sentence"] == OTHERWISE
    narrow = evaluated(replication, tmp_path / "narrow", BETTER, {}, PLAN["pilot_seeds"])
    assert narrow["verdict"]["undecided"] == ["gsm8k", "mbpp", "mnli"]
    assert narrow["verdict"]["sentence"].startswith("Not decided")
    assert narrow["tasks"]["mbpp"]["finished_runs"] == 4
    assert "interval_percent" not in narrow["tasks"]["mbpp"]


def test_a_task_that_stops_shows_its_pilot(replication: ModuleType, tmp_path: Path) -> None:
    pilot, whole = (
        evaluated(replication, tmp_path / str(len(seeds)), BETTER, {"mnli": 0.5}, seeds)["tasks"]["mnli"]
        for seeds in (PLAN["pilot_seeds"], PLAN["seeds"])
    )
    low, high = pilot["interval_percent"]
    assert low < pilot["percent"] < high
    assert (pilot["judged_seeds"], pilot["is_better"]) == (2, False)
    assert whole == pilot | {"finished_runs": 8}


def test_a_task_that_stops_trains_no_more_seeds(
    replication: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run_grid(runs: Sequence[Run], request: Any) -> dict[Run, RunOutcome]:
        asked.extend(run.name for run in runs)
        return drawn(runs, BETTER, dict.fromkeys(noisy, 0.5))

    monkeypatch.setattr(replication, "run_grid", run_grid)

    def execute(*_: Any, **__: Any) -> RunOutcome:
        asked.append("start")
        return RunOutcome(recipe="")

    monkeypatch.setattr(replication, "execute", execute)
    monkeypatch.setattr("sys.argv", ["replication.py", str(STUDY / "replication.yaml"), str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    pilot, ruler = replication.runs_of(PLAN, PLAN["pilot_seeds"], TASKS), replication.ruler_of(PLAN)
    started = replication.secondary_of(PLAN, tmp_path)
    for noisy in (["mnli", "mbpp"], TASKS):
        asked.clear()
        replication.main()
        going_on = replication.runs_of(PLAN, PLAN["seeds"], [name for name in TASKS if name not in noisy])
        assert asked == [*(run.name for run in (*pilot, *going_on, *ruler)), "start", *(run.name for run in started)]


@pytest.mark.parametrize(
    ("losses", "closed"),
    [((0.99, 0.97, 0.98), 100 / 3), ((0.97, 0.99), None), ((1.1, 1.2, 1.3), None), ((None, 0.97, None), 100 / 3)],
    ids=["best of three rates", "a rate is missing", "full fine-tuning is worse", "two rates fail"],
)
def test_the_share_of_the_gap_to_full_fine_tuning_is_told(
    replication: ModuleType, losses: tuple[float | None, ...], closed: float | None, tmp_path: Path
) -> None:
    runs = [run for run in replication.ruler_of(PLAN) if run.task == "mbpp"]
    found = evaluated(replication, tmp_path, BETTER, {}, PLAN["seeds"])
    baseline = found["tasks"]["mbpp"]["losses_of_that_seed"]["lora-plus"]
    for run, loss in zip(runs, losses, strict=False):
        failed = RunOutcome(recipe=digest(run.recipe), failure="training diverged")
        scored = {"nats": (TOKENS * baseline * (loss or 0)).tolist(), "tokens": TOKENS.tolist()}
        keep(tmp_path, {run: failed if loss is None else RunOutcome(recipe=digest(run.recipe), **scored)})
    task = replication.report(PLAN, tmp_path, REGISTRATION)["tasks"]["mbpp"]
    assert task["gap_closed_percent"] == (closed if closed is None else pytest.approx(closed, rel=0.05))


def test_the_kept_report_is_that_of_the_kept_runs(replication: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(STUDY.parents[1])  # recipes of the secondary comparison name the adapter from there
    folder = (STUDY / "replication").relative_to(STUDY.parents[1])
    kept, found = json.loads((folder / "replication.json").read_text()), replication.report(PLAN, folder, REGISTRATION)
    assert {key: kept[key] for key in ("registration_sha256", "verdict")} == {
        "registration_sha256": hashlib.sha256(REGISTRATION).hexdigest(),
        "verdict": found["verdict"],
    }
    assert kept["tasks"].keys() == found["tasks"].keys()
    for name, task in kept["tasks"].items():
        for key, value in found["tasks"][name].items():
            assert task[key] == (pytest.approx(value) if isinstance(value, float | list | dict) else value), name


def test_a_replication_whose_runs_are_kept_trains_nothing(
    replication: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Any]] = []
    monkeypatch.chdir(tmp_path)  # `main` goes to the repository from anywhere
    monkeypatch.setattr(subprocess, "Popen", lambda *asked, **_: pytest.fail(f"{asked} was started"))
    monkeypatch.setattr(replication, "publish_text", lambda path, text: found.append(json.loads(text)))
    monkeypatch.setattr("sys.argv", ["replication.py", str(STUDY / "replication.yaml"), str(STUDY / "replication")])
    replication.main()
    kept = json.loads((STUDY / "replication" / "replication.json").read_text())
    assert [one["verdict"] for one in found] == [kept["verdict"]]


def test_the_docs_quote_the_replication() -> None:
    kept = json.loads((STUDY / "replication" / "replication.json").read_text())
    names = ("../../README.md", "../research/earlier-studies.md", "../gauge.md")
    readme, page, concept = (" ".join((STUDY / name).read_text().replace("*", "").split()) for name in names)
    for text in (readme, page, concept):
        assert kept["verdict"]["sentence"] in text.replace("`", "")
    for name, task in kept["tasks"].items():
        low, high = (f"{end:+.0f}" if abs(end) >= 10 else f"{end:+.1f}" for end in task["interval_percent"])
        shown = f"{task['percent']:+.1f} %", f"{low} to {high} %"
        losses = f"{task['baseline_loss']:.4f} | {task['method_loss']:.4f}"
        widths = [task[key] for key in ("predicted_width_percent", "width_by_its_own_seeds_percent")]
        row = " | ".join((losses, *shown, *(f"{width:.{0 if width >= 10 else 1}f} %" for width in widths)))
        assert f"| {row} |" in page, name
        every = task["losses_of_that_seed"] | task["started_losses"]
        every["full"] = min(loss for loss in task["full_fine_tuning_losses"].values() if loss is not None)
        closed = "no gap" if task["gap_closed_percent"] is None else f"{task['gap_closed_percent']:.0f} %"
        started = f"{100 * (every['eigen-started'] / every['lora-plus-started'] - 1):+.1f} %"
        told = {method: f"{loss:.4f}" for method, loss in every.items()}
        beside = [told[method] for method in ("lora-plus", "eigen", "full")]
        assert f"| {' | '.join([*beside, closed])} |" in page, name
        assert f"| {told['lora-plus-started']} | {told['eigen-started']} | {started} |" in page, name
        assert f"{shown[0]} [{low}, {high}]" in readme, name


def test_the_runs_are_those_that_are_registered(replication: ModuleType) -> None:
    for task in PLAN["tasks"]:
        runs = replication.runs_of(PLAN, PLAN["seeds"], [task["name"]])
        assert {run.recipe.model for run in runs} == {PLAN["model"]}
    for one in read_kept(STUDY / "replication"):
        (task,) = [task for task in PLAN["tasks"] if task["name"] == one.run.partition("/")[0]]
        assert one.failure is not None or len(one.tokens) == task["test_rows"]


def test_the_width_is_that_of_the_interval_to_come(replication: ModuleType, tmp_path: Path) -> None:
    found = evaluated(replication, tmp_path, BETTER, {}, PLAN["seeds"])
    for name, task in found["tasks"].items():
        low, high = task["interval_percent"]
        assert low < BETTER[name] < high, name
        assert task["predicted_width_percent"] == pytest.approx(high - low, rel=0.5), name


def test_runs_of_other_rows_are_not_compared(replication: ModuleType, tmp_path: Path) -> None:
    first, other = replication.runs_of(PLAN, PLAN["pilot_seeds"], ["mbpp"])[:2]
    for run, outcome in drawn([first, other], BETTER, {}).items():
        keep(tmp_path, {run: outcome.model_copy(update={"train_rows": run.name})})
    with pytest.raises(LoraOverError, match="had different training rows"):
        replication.report(PLAN, tmp_path, REGISTRATION)


def test_a_failed_run_is_never_better(replication: ModuleType, tmp_path: Path) -> None:
    evaluated(replication, tmp_path, BETTER, {}, PLAN["seeds"])
    run = replication.runs_of(PLAN, [102], ["mbpp"])[1]
    keep(tmp_path, {run: RunOutcome(recipe=digest(run.recipe), failure="training diverged")})
    found = replication.report(PLAN, tmp_path, REGISTRATION)
    assert found["tasks"]["mbpp"]["failed"] == [run.name]
    assert found["verdict"]["better"] == ["gsm8k", "mnli"]
