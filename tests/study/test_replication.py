"""The registered replication of `eigen`, judged on drawn losses whose truth is known."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from loraover.study.kept_runs import keep
from loraover.study.outcome import RunOutcome, digest

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


def judged(
    replication: ModuleType, folder: Path, effects: dict[str, float], noise: dict[str, float], seeds: list[int]
) -> dict[str, Any]:
    """The report on runs whose methods differ by an effect on each task, in per cent, with noise of seeds and rows."""
    outcomes = {}
    for run in replication.runs_of(PLAN, seeds, TASKS):
        of = TASKS.index(run.task), len(run.method)
        effect = effects[run.task] / 100 if run.method == "eigen" else 0.0
        effect += np.random.default_rng([run.seed, *of]).normal(0, 0.0004)
        nats = TOKENS * (1 + effect + np.random.default_rng(of).normal(0, noise.get(run.task, 0.015), ROWS))
        outcomes[run] = RunOutcome(recipe=digest(run.recipe), nats=nats.tolist(), tokens=TOKENS.tolist())
    keep(folder, outcomes)
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
    found = judged(replication, tmp_path, effects, noise, PLAN["seeds"])
    assert found["verdict"] == {"better": better, "undecided": [], "required": 2, "sentence": sentence}
    assert [name for name, task in found["tasks"].items() if "stopped" in task] == [n for n in TASKS if n in noise]


def test_a_pilot_decides_what_it_can(replication: ModuleType, tmp_path: Path) -> None:
    wide = judged(replication, tmp_path / "wide", BETTER, dict.fromkeys(TASKS, 0.5), PLAN["pilot_seeds"])
    assert wide["verdict"]["sentence"] == OTHERWISE
    low, high = wide["tasks"]["mbpp"]["pilot"]["interval_percent"]
    assert low < wide["tasks"]["mbpp"]["pilot"]["percent"] < high
    narrow = judged(replication, tmp_path / "narrow", BETTER, {}, PLAN["pilot_seeds"])
    assert narrow["verdict"]["undecided"] == ["gsm8k", "mbpp", "mnli"]
    assert narrow["verdict"]["sentence"].startswith("Not decided")
    assert narrow["tasks"]["mbpp"]["finished_runs"] == 4
    assert "interval_percent" not in narrow["tasks"]["mbpp"]


def test_the_width_is_that_of_the_interval_to_come(replication: ModuleType, tmp_path: Path) -> None:
    found = judged(replication, tmp_path, BETTER, {}, PLAN["seeds"])
    for name, task in found["tasks"].items():
        low, high = task["interval_percent"]
        assert low < BETTER[name] < high, name
        assert task["predicted_width_percent"] == pytest.approx(high - low, rel=0.5), name


def test_the_docs_quote_what_the_kept_runs_show(replication: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(STUDY.parents[1])
    found = replication.report(PLAN, Path("docs/study/replication"), REGISTRATION)
    kept = json.loads((STUDY / "replication" / "replication.json").read_text())
    assert found["verdict"] == kept["verdict"]
    assert found["registration_sha256"] == kept["registration_sha256"]
    readme, page, concept = ((STUDY / name).read_text() for name in ("../../README.md", "README.md", "../gauge.md"))
    for text in (readme, page, concept):
        assert kept["verdict"]["sentence"] in " ".join(text.replace("`", "").replace("*", "").split())
    for name, task in found["tasks"].items():
        pilot = task["pilot"]
        assert pilot["interval_percent"] == pytest.approx(kept["tasks"][name]["pilot"]["interval_percent"]), name
        low, high = (f"{end:+.0f}" if abs(end) >= 10 else f"{end:+.1f}" for end in pilot["interval_percent"])
        shown = f"{pilot['percent']:+.1f} %", f"{low} to {high} %"
        losses = f"{pilot['baseline_loss']:.4f} | {pilot['method_loss']:.4f}"
        widths = [task[key] for key in ("predicted_width_percent", "width_by_its_own_seeds_percent")]
        row = " | ".join((losses, *shown, *(f"{width:.{0 if width >= 10 else 1}f} %" for width in widths)))
        assert f"| {row} |" in page, name
        assert shown[0] in readme, name
        assert shown[1] in readme, name


def test_a_failed_run_is_never_better(replication: ModuleType, tmp_path: Path) -> None:
    judged(replication, tmp_path, BETTER, {}, PLAN["seeds"])
    run = replication.runs_of(PLAN, [102], ["mbpp"])[1]
    keep(tmp_path, {run: RunOutcome(recipe=digest(run.recipe), failure="training diverged")})
    found = replication.report(PLAN, tmp_path, REGISTRATION)
    assert found["tasks"]["mbpp"]["failed"] == [run.name]
    assert found["verdict"]["better"] == ["gsm8k", "mnli"]
