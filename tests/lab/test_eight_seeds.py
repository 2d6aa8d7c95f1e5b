"""The registered study of eight seeds, evaluated on drawn losses and compared with an independent computation."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from loraover_lab.study.grid import Run
from loraover_lab.study.outcome import RunOutcome, digest, keep, read_kept

from oracles.registered_study import answer, half_width, p_value, student_p

STUDY = Path(__file__).parents[2] / "docs" / "study"
REGISTRATION = (STUDY / "eight-seeds.yaml").read_bytes()
PLAN = yaml.safe_load(REGISTRATION)
TASKS = list(PLAN["tasks"])
QUESTIONS = PLAN["questions"]
ROWS = 60
TOKENS = np.random.default_rng(0).integers(20, 90, ROWS)


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("eight_seeds", STUDY / "eight_seeds.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcome(run: Run, loss: float, noise: float = 0.01) -> RunOutcome:
    """An outcome with a mean loss per token, and noise of the run and of each row."""
    draw = np.random.default_rng([run.seed, len(run.method), TASKS.index(run.task.partition("-")[0])])
    nats = TOKENS * (loss + draw.normal(0, 0.0005) + draw.normal(0, noise, ROWS))
    return RunOutcome(
        recipe=digest(run.recipe), nats=nats.tolist(), tokens=TOKENS.tolist(), step_seconds=1.0, peak_bytes=1
    )


def choose(study: ModuleType, folder: Path, task: str) -> dict[Run, RunOutcome]:
    """Finish a task's sweeps with losses that are lowest in the middle, as they are trained."""
    done: dict[Run, RunOutcome]
    while True:
        runs, done = study.choosing(PLAN, folder, task)
        if len(done) == len(runs):
            return done
        keep(folder, {run: outcome(run, 1 + abs(np.log(run.rate / 1e-3)) / 100, 0.0) for run in runs})


def evaluated(study: ModuleType, folder: Path, effects: dict[tuple[str, str], float], noise: float = 0.01) -> Any:
    """The report on drawn runs, whose arms differ from plain LoRA by an effect in per cent."""
    for task in TASKS:
        runs = study.task_runs(PLAN, choose(study, folder, task), task)
        keep(folder, {run: outcome(run, 1 + effects.get((task, run.method), 0.0) / 100, noise) for run in runs})
    return study.report(PLAN, folder, REGISTRATION)


def everywhere(arm: str, percent: float) -> dict[tuple[str, str], float]:
    return {(task, arm): percent for task in TASKS}


@pytest.mark.parametrize(
    ("effects", "answers"),
    [
        (everywhere("eigen", -3.0) | {("qnli", "eigen"): 0.0}, {"a": "yes", "b": "no", "c": "yes"}),
        (everywhere("eigen", -3.0) | {("qnli", "eigen"): 3.0}, {"a": "cannot be told", "c": "cannot be told"}),
        (everywhere("mpo", -3.0) | everywhere("lora-plus", -3.0), {"a": "no", "b": "yes", "c": "no"}),
        (everywhere("eigen", -3.0) | {("qnli", "eigen"): 0.0, ("mnli", "eigen"): 0.0}, {"a": "no"}),
    ],
    ids=["below on three", "above on one", "mpo and LoRA+ below", "below on two"],
)
def test_the_registered_rule_is_applied(
    study: ModuleType, effects: dict[tuple[str, str], float], answers: dict[str, str], tmp_path: Path
) -> None:
    found = evaluated(study, tmp_path, effects)
    assert {name: found["questions"][name]["answer"] for name in answers} == answers
    for name, given_answer in answers.items():
        assert found["questions"][name]["sentence"] == QUESTIONS[name][given_answer]


def test_noise_leaves_a_question_open(study: ModuleType, tmp_path: Path) -> None:
    found = evaluated(study, tmp_path, {}, noise=0.3)
    assert {question["answer"] for question in found["questions"].values()} == {"cannot be told"}


def test_the_figures_are_those_of_an_independent_computation(study: ModuleType, tmp_path: Path) -> None:
    effects = {("qnli", "eigen"): -1.0, ("mnli", "eigen"): -0.2, ("gsm8k", "mpo"): 0.4}
    check_figures(evaluated(study, tmp_path, effects), tmp_path)


def test_the_kept_answers_are_those_of_an_independent_computation(study: ModuleType) -> None:
    kept = STUDY / "eight-seeds" / "eight-seeds.json"
    if not kept.is_file():
        pytest.skip("the runs of the study are not finished")
    found = json.loads(kept.read_text())
    assert found == study.report(PLAN, kept.parent, REGISTRATION) | {key: found[key] for key in ("versions", "date")}
    if all(question["answer"] for question in found["questions"].values()):
        check_figures(found, kept.parent)


def check_figures(found: Any, folder: Path) -> None:
    """Compare a report with the oracle on the kept runs."""
    kept = {one.run: one for one in read_kept(folder)}
    for name, question in found["questions"].items():
        tasks = []
        for task in TASKS:
            arms = {
                part: [
                    kept[f"{task}/{question_arm}/lr-{found['tasks'][task]['rates'][question_arm]:g}/seed-{seed}"]
                    for seed in PLAN["seeds"]
                ]
                for part, question_arm in (
                    ("method", QUESTIONS[name]["method"]),
                    ("baseline", QUESTIONS[name]["baseline"]),
                )
            }
            nats = {part: np.array([one.nats for one in runs]) for part, runs in arms.items()}
            tasks.append(nats | {"tokens": np.array(arms["method"][0].tokens, dtype=np.float64)})
        expected, figures = answer(tasks)
        assert question["answer"] == expected
        for (task, shown), one in zip(question["tasks"].items(), figures, strict=True):
            assert shown["percent"] == pytest.approx(one["percent"], abs=1e-9), (name, task)
            assert shown["interval_percent"] == pytest.approx([one["low"], one["high"]], abs=1e-9), (name, task)
            assert shown["corrected_p"] == pytest.approx(one["corrected"], rel=1e-6), (name, task)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), seeds=st.integers(3, 9), effect=st.floats(-0.02, 0.02))
def test_the_oracle_is_students_test_where_rows_do_not_differ(seed: int, seeds: int, effect: float) -> None:
    of_seed = effect + np.random.default_rng(seed).normal(0, 0.01, seeds)
    gaps = of_seed[:, None] * np.ones(4)
    t = of_seed.mean() / (of_seed.std(ddof=1) / np.sqrt(seeds))
    assert p_value(gaps, np.ones(4)) == pytest.approx(student_p(t, seeds - 1), rel=1e-6)
    assert half_width(gaps, np.ones(4), 0.5) < half_width(gaps, np.ones(4), 0.05)


def test_nothing_is_compared_before_all_runs_of_a_task_are_there(study: ModuleType, tmp_path: Path) -> None:
    runs = study.task_runs(PLAN, choose(study, tmp_path, "gsm8k"), "gsm8k")
    keep(tmp_path, {run: outcome(run, 1.0) for run in runs[:-1]})
    found = study.report(PLAN, tmp_path, REGISTRATION)
    assert found["tasks"]["gsm8k"].keys() == {"rates", "missing_runs"}
    assert found["tasks"]["gsm8k"]["missing_runs"] == 1
    assert all(question["tasks"] == {} for question in found["questions"].values())
    assert all(question["answer"] is None for question in found["questions"].values())


def test_a_failed_run_of_a_method_is_above_and_of_a_baseline_neither(study: ModuleType, tmp_path: Path) -> None:
    for arm in ("lora", "eigen"):
        folder = tmp_path / arm
        for task in TASKS:
            runs = study.task_runs(PLAN, choose(study, folder, task), task)
            keep(folder, {run: outcome(run, 0.97 if run.method == "eigen" else 1.0) for run in runs})
            (one,) = [run for run in runs if run.method == arm and run.seed == 203]
            if task == "mbpp":
                keep(folder, {one: RunOutcome(recipe=digest(one.recipe), failure="training diverged")})
        found = study.report(PLAN, folder, REGISTRATION)["questions"]["a"]
        assert found["tasks"]["mbpp"]["is_above"] == (arm == "eigen")
        assert found["answer"] == ("cannot be told" if arm == "eigen" else "yes")


@pytest.mark.parametrize(
    ("optimum", "more", "chosen"), [(8e-3, [6e-3, 1.2e-2], 6e-3), (8e-5, [4.75e-5, 9.5e-5], 9.5e-5), (8e-4, [], 7.5e-4)]
)
def test_a_sweep_goes_on_beyond_an_end_until_its_best_rate_is_inside(
    study: ModuleType, optimum: float, more: list[float], chosen: float, tmp_path: Path
) -> None:
    while True:
        runs, done = study.choosing(PLAN, tmp_path, "qnli")
        if len(done) == len(runs):
            break
        keep(tmp_path, {run: outcome(run, 1 + abs(np.log(run.rate / optimum)), 0.0) for run in runs})
    rates = sorted({run.rate for run in runs if run.method == "mpo"})
    assert rates == pytest.approx(sorted([1.9e-4, 3.75e-4, 7.5e-4, 1.5e-3, 3e-3, *more]))
    assert study.chosen_rate(PLAN, done, "qnli", "mpo") == pytest.approx(chosen)
    assert study.chosen_rate(PLAN, done, "qnli", "lora") == 3.75e-4


def test_an_added_rate_replaces_a_kept_one_only_if_it_is_better(study: ModuleType, tmp_path: Path) -> None:
    (added,) = study.choosing(PLAN, tmp_path, "gsm8k")[0]
    assert study.chosen_rate(PLAN, {}, "gsm8k", "mpo") is None
    for loss, rate in ((0.83, 6e-3), (0.82, 7.5e-4)):
        assert study.chosen_rate(PLAN, {added: outcome(added, loss, 0.0)}, "gsm8k", "mpo") == rate


def test_kept_sweeps_are_those_of_the_kept_runs() -> None:
    """Rates, losses and numbers of rates in the registration are those that earlier studies kept."""
    methods = {"lora": "lora", "lora-plus": "lora_training.loraplus_lr_ratio=4", "mpo": "lora-over"}
    methods["eigen"] = "lora-over_decomposition=eigen_options=_long_calibration_training.loraplus_lr_ratio=4"
    for task, sweep in PLAN["kept_sweeps"].items():
        for arm in sweep.keys() & PLAN["arms"].keys():
            kept = [one for folder in sweep[arm]["from"] for one in read_kept(STUDY / folder)]
            losses = {
                float(rate.removeprefix("lr-")): sum(one.nats[::2]) / sum(one.tokens[::2])
                for one in kept
                for name, method, rate, seed in [one.run.split("/")]
                if (name, method, seed) == (sweep["recipe"], methods[arm], "seed-0")
            }
            assert sorted(losses) == pytest.approx(sorted(sweep[arm]["tried"])), (task, arm)
            best = min(losses, key=lambda rate: losses[rate])
            assert sweep[arm]["rate"] == pytest.approx(best), (task, arm)
            assert sweep[arm]["loss"] == pytest.approx(losses[best], abs=5e-5), (task, arm)


def test_every_arm_has_five_rates_and_new_seeds() -> None:
    used = {int(one.run.rpartition("-")[2]) for file in STUDY.glob("*/runs.jsonl") if file.parent.name != "eight-seeds"
            for one in read_kept(file.parent)}  # fmt: skip
    assert not used & {*PLAN["seeds"], *PLAN["sweeps"]["seeds"]}
    for task in TASKS:
        kept, added = PLAN["kept_sweeps"].get(task, {}), PLAN["added_rates"].get(task, {})
        for arm in PLAN["arms"]:
            tried = kept.get(arm, {}).get("tried", []) or PLAN["sweeps"][task]["rates"][arm]
            assert len(tried) + len(added.get(arm, [])) >= 5, (task, arm)
