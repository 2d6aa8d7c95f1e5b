"""Train and evaluate the study that eight-seeds.yaml registers; finished runs are kept, so a second call continues.

    python docs/study/eight_seeds.py docs/study/eight-seeds.yaml docs/study/eight-seeds [--report-only] [--jobs 2]

Task by task, the runs that choose rates come first, then those that are compared. Losses are neither printed nor
compared before all runs of a task are there. Writes eight-seeds.json beside the runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from loraover.common.atomic_output import publish_text
from loraover.common.errors import LoraOverError
from loraover.common.multiple_testing import holm
from loraover.common.provenance import environment, today
from loraover.training.recipe import load_recipe
from loraover_lab.study.analysis import LEVEL, difference, mean_loss
from loraover_lab.study.grid import DEFAULTS, Run
from loraover_lab.study.outcome import RunOutcome, execute, finished, keep
from loraover_lab.study.tuning import check_inputs, losses_of, tokens_of

Registration = Mapping[str, Any]
Outcomes = Mapping[Run, RunOutcome]
HERE = Path(__file__).parent
ALL, EVEN = slice(None), slice(0, None, 2)


def make_run(
    plan: Registration, of: Mapping[str, Any], name: str, arm: str, rate: float, seed: int, **more: object
) -> Run:
    """One run of an arm with the recipe and settings of a task, of a sweep or of a kept sweep."""
    values = plan["settings"] | of.get("settings", {}) | more
    values |= {"training.learning_rate": rate, "training.seed": seed}
    recipe = load_recipe(str(HERE / f"{of['recipe']}.yaml"), DEFAULTS | plan["arms"][arm] | values)
    return Run(name, arm, rate, seed, recipe)


def added_runs(plan: Registration, task: str) -> list[Run]:
    """Runs that complete a task's kept sweeps to five rates."""
    added = plan["added_rates"]
    return [
        make_run(plan, plan["kept_sweeps"][task], f"{task}-added", arm, rate, added["seed"], **added["settings"])
        for arm, rates in added.get(task, {}).items()
        for rate in rates
    ]


def sweep_runs(plan: Registration, outcomes: Outcomes, task: str) -> list[Run]:
    """Runs of a task's sweeps, with the rates beyond an end that the finished ones ask for."""
    sweeps = plan["sweeps"]
    return [
        make_run(plan, sweeps[task], f"{task}-sweep", arm, rate, seed)
        for arm, rates in sweeps.get(task, {}).get("rates", {}).items()
        for rate in _extended(rates, sweep_losses(plan, outcomes, task, arm))
        for seed in sweeps["seeds"]
    ]


def sweep_losses(plan: Registration, outcomes: Outcomes, task: str, arm: str) -> dict[float, float]:
    """Mean validation loss at each rate that all seeds of a sweep have finished at; infinite where a run failed."""
    rows = EVEN if plan["sweeps"][task]["rows"] == "even" else ALL
    found: dict[float, list[float]] = {}
    for run, outcome in outcomes.items():
        if (run.task, run.method) == (f"{task}-sweep", arm):
            found.setdefault(run.rate, []).append(validation_loss(outcome, rows))
    seeds = len(plan["sweeps"]["seeds"])
    return {rate: sum(each) / seeds for rate, each in found.items() if len(each) == seeds}


def validation_loss(outcome: RunOutcome, rows: slice) -> float:
    """Nats per token on some held-out rows; infinite for a run that failed."""
    return math.inf if outcome.failure is not None else sum(outcome.nats[rows]) / sum(outcome.tokens[rows])


def _extended(rates: Sequence[float], losses: Mapping[float, float]) -> list[float]:
    """Rates of a sweep, and two beyond each end that was the best of all rates up to then."""
    rates = sorted(rates)
    while all(rate in losses for rate in rates):
        best = min(rates, key=lambda rate: losses[rate])
        if best == rates[0]:
            rates = [best / 4, best / 2, *rates]
        elif best == rates[-1]:
            rates = [*rates, 2 * best, 4 * best]
        else:
            break
    return rates


def chosen_rate(plan: Registration, outcomes: Outcomes, task: str, arm: str) -> float | None:
    """Rate of an arm on a task by the registered rule; None: runs that choose it are missing."""
    if kept := plan["kept_sweeps"].get(task, {}).get(arm):
        losses = {float(kept["rate"]): float(kept["loss"])}
        losses |= {
            run.rate: validation_loss(outcome, EVEN)
            for run, outcome in outcomes.items()
            if (run.task, run.method) == (f"{task}-added", arm)
        }
        is_done = len(losses) == 1 + len(plan["added_rates"].get(task, {}).get(arm, []))
    else:
        losses = sweep_losses(plan, outcomes, task, arm)
        rates = _extended(plan["sweeps"][task]["rates"][arm], losses)
        is_done = all(rate in losses for rate in rates)
    return min(losses, key=lambda rate: losses[rate]) if is_done else None


def task_runs(plan: Registration, outcomes: Outcomes, task: str) -> list[Run]:
    """Runs that compare the arms of a task, seed by seed; none before the rates of all its arms are chosen."""
    rates = {arm: chosen_rate(plan, outcomes, task, arm) for arm in plan["arms"]}
    return [
        make_run(plan, plan["tasks"][task], task, arm, rate, seed)
        for seed in plan["seeds"]
        for arm, rate in rates.items()
        if rate is not None and None not in rates.values()
    ]


def train(plan: Registration, runs: Sequence[Run], folder: Path, jobs: int) -> None:
    """Train the runs that are not finished, and print their names; the folder of a kept run is removed."""
    done = finished(runs, folder)
    left = [run for run in runs if run not in done]
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def finish(run: Run) -> str:
        outcome = execute(run.recipe, folder / run.folder, threads)
        expected = plan["tasks"].get(run.task, {}).get("test_rows", len(outcome.tokens))
        if outcome.failure is None and len(outcome.tokens) != expected:
            raise LoraOverError(f"{run.name} was evaluated on {len(outcome.tokens)} rows, expected {expected}.")
        keep(folder, {run: outcome})
        shutil.rmtree(folder / run.folder)
        return run.name

    with ThreadPoolExecutor(jobs) as pool:
        for number, name in enumerate(pool.map(finish, left), 1):
            print(f"{number}/{len(left)} {name}", flush=True)


def choosing(plan: Registration, folder: Path, task: str) -> tuple[list[Run], dict[Run, RunOutcome]]:
    """Runs known so far that choose a task's rates, and the finished ones."""
    found: dict[Run, RunOutcome] = {}
    while True:
        runs = [*added_runs(plan, task), *sweep_runs(plan, found, task)]
        now = finished(runs, folder)
        if len(now) == len(found):
            return runs, now
        found = now


def train_task(plan: Registration, folder: Path, task: str, jobs: int) -> None:
    """Choose the rates of a task's arms, then train the runs that compare them."""
    runs, done = choosing(plan, folder, task)
    while len(done) < len(runs):
        train(plan, runs, folder, jobs)
        runs, done = choosing(plan, folder, task)
    train(plan, task_runs(plan, done, task), folder, jobs)


def compare(outcomes: Outcomes, question: Mapping[str, str]) -> dict[str, Any]:
    """Difference of a question's method to its baseline on a task's runs, in per cent of the baseline's loss.

    `p` is not yet corrected. A task on which a run failed has `failed` in place of numbers.
    """
    arms = {
        name: sorted((run for run in outcomes if run.method == question[name]), key=lambda run: run.seed)
        for name in ("method", "baseline")
    }
    failed = {name: [run.name for run in runs if outcomes[run].failure is not None] for name, runs in arms.items()}
    if any(failed.values()):
        return {"failed": failed, "p": 1.0}
    new, old = (losses_of([outcomes[run] for run in runs], ALL) for runs in arms.values())
    tokens = tokens_of([run for runs in arms.values() for run in runs], outcomes)
    found, loss = difference(new, old, tokens), mean_loss(old, tokens)
    return {
        "baseline_loss": loss,
        "method_loss": mean_loss(new, tokens),
        "percent": 100 * found.mean / loss,
        "interval_percent": [100 * end / loss for end in found.interval],
        "pairs_below": int(((new - old).sum(1) < 0).sum()),
        "p": found.p,
    }


def answer(plan: Registration, tasks: Mapping[str, dict[str, Any]]) -> str:
    """Apply the registered rule to the four tasks of a question, and note the corrected p-values in them."""
    rule, placed = plan["rule"], []
    for found, p in zip(tasks.values(), holm([found["p"] for found in tasks.values()]), strict=True):
        is_clear = p < LEVEL and "failed" not in found
        found |= {"corrected_p": p, "is_below": is_clear and found["percent"] < 0}
        found["is_above"] = (is_clear and found["percent"] > 0) or bool(found.get("failed", {}).get("method"))
        excludes = "failed" not in found and found["interval_percent"][0] > -rule["gain_percent"]
        placed.append((found["is_below"], found["is_above"], found["is_above"] or excludes))
    below, above, without_gain = (sum(each) for each in zip(*placed, strict=True))
    if below >= rule["required_below"] and not above:
        return "yes"
    return "no" if without_gain >= rule["required_without_gain"] else "cannot be told"


def shown(outcomes: Outcomes) -> dict[str, dict[str, Any]]:
    """What stands beside the answers, by arm: exact answers in per cent, a step's seconds and bytes, served numbers."""
    found: dict[str, list[RunOutcome]] = {}
    for run, outcome in outcomes.items():
        if outcome.failure is None:
            found.setdefault(run.method, []).append(outcome)
    return {
        arm: {
            "exact_percent": _mean(each.score for each in outcomes),
            "step_seconds": median(each.step_seconds for each in outcomes if each.step_seconds is not None),
            "peak_bytes": median(each.peak_bytes for each in outcomes if each.peak_bytes is not None),
            "served_parameters": outcomes[0].served_parameters,
            "served_bytes": outcomes[0].served_bytes,
        }
        for arm, outcomes in found.items()
    }


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def report(plan: Registration, folder: Path, registration: bytes) -> dict[str, Any]:
    """State what the finished runs show; a task with missing runs has their number and nothing else."""
    tasks: dict[str, dict[str, Any]] = {}
    compared: dict[str, dict[Run, RunOutcome]] = {}
    for task in plan["tasks"]:
        _, chosen = choosing(plan, folder, task)
        rates = {arm: chosen_rate(plan, chosen, task, arm) for arm in plan["arms"]}
        runs = task_runs(plan, chosen, task)
        outcomes = finished(runs, folder)
        check_inputs(outcomes)
        missing = len(plan["seeds"]) * len(plan["arms"]) - len(outcomes)
        tasks[task] = {"rates": rates, "missing_runs": missing}
        if not missing:
            compared[task] = outcomes
            tasks[task] |= {"arms": shown(outcomes)}
    questions: dict[str, Any] = {}
    for name, question in plan["questions"].items():
        found = {task: compare(outcomes, question) for task, outcomes in compared.items()}
        is_whole = len(found) == len(tasks)
        given = answer(plan, found) if is_whole else None
        sentence = "Not answered: runs are missing." if given is None else question[given]
        questions[name] = {"answer": given, "sentence": sentence, "tasks": found}
    return {
        "registration_sha256": hashlib.sha256(registration).hexdigest(),
        "questions": questions,
        "tasks": tasks,
        "versions": environment("scipy", "transformers"),
        "date": today(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("registration", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--report-only", action="store_true")
    asked = parser.parse_args()
    registration, folder = asked.registration.read_bytes(), asked.folder.resolve()
    os.chdir(HERE.parents[1])
    plan = yaml.safe_load(registration)
    if not asked.report_only:
        for task in plan["tasks"]:
            train_task(plan, folder, task, asked.jobs)
    found = report(plan, folder, registration)
    publish_text(folder / "eight-seeds.json", json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: found[key] for key in ("tasks", "questions")}, indent=1))


if __name__ == "__main__":
    main()
