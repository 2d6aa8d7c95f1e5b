"""Train and evaluate the replication in replication.yaml; finished runs are kept, so that a second call continues.

    python docs/study/replication.py docs/study/replication.yaml docs/study/replication [--report-only] [--jobs 2]

Writes replication.json beside the runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from loraover.common.atomic_output import publish_text
from loraover.common.errors import LoraOverError
from loraover.common.provenance import environment, today
from loraover.reporting.reporter import ConsoleReporter
from loraover.training.recipe import load_recipe
from loraover_lab.study.analysis import LEVEL, Losses, Spread, difference, mean_loss, percent_variances
from loraover_lab.study.grid import DEFAULTS, Run
from loraover_lab.study.outcome import RunOutcome, execute, finished
from loraover_lab.study.request import StudyRequest
from loraover_lab.study.runner import run_grid
from loraover_lab.study.tuning import check_inputs, losses_of, tokens_of

Registration = Mapping[str, Any]
HERE = Path(__file__).parent


def runs_of(plan: Registration, seeds: list[int], tasks: list[str]) -> list[Run]:
    """Both methods on some tasks with some seeds."""
    methods = plan["primary"].values()
    return [
        _run(plan, task, method, float(plan["learning_rate"]), seed)
        for seed in seeds
        for task in plan["tasks"]
        if task["name"] in tasks
        for method in methods
    ]


def ruler_of(plan: Registration) -> list[Run]:
    """Full fine-tuning at each of its rates."""
    ruler = plan["ruler"]
    return [
        _run(plan, task, ruler, float(rate), ruler["seed"])
        for task in plan["tasks"]
        for rate in ruler["learning_rates"]
    ]


def start_of(plan: Registration) -> Run:
    """The run whose adapter both methods are started from in the secondary comparison."""
    task = {"name": plan["secondary"]["start_from"], "recipe": plan["secondary"]["start_from"], "max_steps": 100}
    return _run(plan, task, plan["primary"]["baseline"], float(plan["learning_rate"]), plan["ruler"]["seed"])


def secondary_of(plan: Registration, adapter: Path) -> list[Run]:
    """Both methods on every task, started from an adapter, with the first seed."""
    named = {method["name"]: method for method in plan["primary"].values()}
    return [
        _run(
            plan,
            task,
            {"name": f"{name}-started", "settings": named[name]["settings"] | {"lora.start_from": str(adapter)}},
            float(plan["learning_rate"]),
            plan["seeds"][0],
        )
        for task in plan["tasks"]
        for name in plan["secondary"]["methods"]
    ]


def _run(plan: Registration, task: Mapping[str, Any], method: Mapping[str, Any], rate: float, seed: int) -> Run:
    values = {"training.learning_rate": rate, "training.seed": seed, "training.max_steps": task["max_steps"]}
    values["training.bf16"] = plan["bf16"]
    recipe = load_recipe(str(HERE / f"{task['recipe']}.yaml"), DEFAULTS | method["settings"] | values)
    return Run(task["name"], method["name"], rate, seed, recipe)


def failures(outcomes: Mapping[Run, RunOutcome], task: str) -> list[str]:
    """Names of a task's runs that have no loss; such a task does not count as better."""
    failed = (run.name for run, outcome in outcomes.items() if run.task == task and outcome.failure is not None)
    return [*dict.fromkeys(failed)]


def losses(plan: Registration, outcomes: Mapping[Run, RunOutcome], task: str) -> tuple[Losses, Losses, Losses]:
    """Nats of the method and of the baseline, shape (seeds, rows) by seed, and tokens, shape (rows,)."""
    found = sorted((run for run in outcomes if run.task == task), key=lambda run: run.seed)
    new, old = (
        losses_of([outcomes[run] for run in found if run.method == plan["primary"][arm]["name"]], slice(None))
        for arm in ("method", "baseline")
    )
    return new, old, tokens_of(found, outcomes)


def predicted_widths(plan: Registration, outcomes: Mapping[Run, RunOutcome]) -> dict[str, float]:
    """Width of each task's interval with all seeds, in per cent, from the pilot; infinite where a run failed."""
    rows, seeds = {task["name"]: task["test_rows"] for task in plan["tasks"]}, len(plan["seeds"])
    found = {name: percent_variances(*losses(plan, outcomes, name)) for name in rows if not failures(outcomes, name)}
    of_seeds = sum(seed for seed, _ in found.values()) / max(1, len(found))
    spreads = {
        name: Spread((of_seeds / seeds, of_row / rows[name]), (seeds - 1, rows[name] - 1))
        for name, (_, of_row) in found.items()
    }
    return {name: 2 * spreads[name].half(LEVEL) if name in spreads else math.inf for name in rows}


def compare(plan: Registration, outcomes: Mapping[Run, RunOutcome], task: str) -> dict[str, Any]:
    """Difference of the method to the baseline on one task, with its interval, in per cent of the baseline's loss."""
    new, old, tokens = losses(plan, outcomes, task)
    found, loss = difference(new, old, tokens), mean_loss(old, tokens)
    low, high = (100 * end / loss for end in found.interval)
    return {
        "judged_seeds": len(new),
        "baseline_loss": loss,
        "method_loss": mean_loss(new, tokens),
        "percent": 100 * found.mean / loss,
        "interval_percent": [low, high],
        "is_better": high < 0,
    }


def closed(plan: Registration, full: Mapping[str, float | None], both: Mapping[str, float | None]) -> float | None:
    """Per cent of the gap from the baseline to full fine-tuning at its best rate that the method closes.

    Args:
        plan: The registration.
        full: Loss of full fine-tuning at each rate.
        both: Loss of the method and of the baseline, by their names.

    Returns:
        None: a loss is not known, or full fine-tuning is not better than the baseline.
    """
    known = [loss for loss in full.values() if loss is not None]
    method, baseline = (both.get(plan["primary"][arm]["name"]) for arm in ("method", "baseline"))
    if method is None or baseline is None or len(full) < len(plan["ruler"]["learning_rates"]) or not known:
        return None
    gap = baseline - min(known)
    return 100 * (baseline - method) / gap if gap > 0 else None


def verdict(plan: Registration, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Apply the registered rule to what is known of each task: `is_better`, which an unfinished one has not."""
    known: dict[str, list[bool | None]] = {}
    for task in plan["tasks"]:
        known.setdefault(task["counts_as"], []).append(tasks[task["name"]].get("is_better"))
    better = [name for name, each in known.items() if all(each)]
    undecided = [name for name, each in known.items() if None in each and False not in each]
    rule, sentence = plan["rule"], "Not decided: runs are missing."
    if len(better) >= rule["required"]:
        sentence = rule["then"]
    elif len(better) + len(undecided) < rule["required"]:
        sentence = rule["otherwise"]
    return {"better": better, "undecided": undecided, "required": rule["required"], "sentence": sentence}


def _loss(outcome: RunOutcome) -> float | None:
    return None if outcome.failure is not None else mean_loss(np.array([outcome.nats]), np.array(outcome.tokens))


def _by_method(outcomes: Mapping[Run, RunOutcome], task: str) -> dict[str, float | None]:
    return {run.method: _loss(outcome) for run, outcome in outcomes.items() if run.task == task}


def report(plan: Registration, folder: Path, registration: bytes) -> dict[str, Any]:
    """State what the finished runs show by the registered rule.

    A task that stops after the pilot has the pilot's interval, which decides nothing. One with unfinished seeds has
    none.
    """
    names = [task["name"] for task in plan["tasks"]]
    pilot = finished(runs_of(plan, plan["pilot_seeds"], names), folder)
    is_piloted = len(pilot) == len(runs_of(plan, plan["pilot_seeds"], names))
    widths = predicted_widths(plan, pilot) if is_piloted else {}
    ruler = finished(ruler_of(plan), folder)
    started = finished(secondary_of(plan, folder / start_of(plan).folder / "adapter"), folder)
    check_inputs(started)
    of_that_seed = finished(runs_of(plan, [plan["ruler"]["seed"]], names), folder)
    tasks: dict[str, Any] = {}
    for name in names:
        asked = runs_of(plan, plan["seeds"], [name])
        outcomes = finished(asked, folder)
        check_inputs(outcomes)
        tasks[name] = {"finished_runs": len(outcomes), "predicted_width_percent": widths.get(name)}
        if failed := failures(pilot | outcomes, name):
            tasks[name] |= {"failed": failed, "is_better": False, "predicted_width_percent": None}
        elif is_piloted and widths[name] >= plan["required_width_percent"]:
            tasks[name] |= compare(plan, pilot, name) | {"is_better": False}
            tasks[name]["stopped"] = "after the pilot: the interval would be too wide"
            alone = {**plan, "tasks": [task for task in plan["tasks"] if task["name"] == name]}
            tasks[name]["width_by_its_own_seeds_percent"] = predicted_widths(alone, pilot)[name]
        elif len(outcomes) == len(asked):
            tasks[name] |= compare(plan, outcomes, name)
        full = {run.rate: _loss(outcome) for run, outcome in ruler.items() if run.task == name}
        tasks[name]["full_fine_tuning_losses"] = {f"{rate:g}": loss for rate, loss in sorted(full.items())}
        tasks[name]["losses_of_that_seed"] = _by_method(of_that_seed, name)
        tasks[name]["gap_closed_percent"] = closed(
            plan, tasks[name]["full_fine_tuning_losses"], tasks[name]["losses_of_that_seed"]
        )
        tasks[name]["started_losses"] = _by_method(started, name)
    return {
        "registration_sha256": hashlib.sha256(registration).hexdigest(),
        "verdict": verdict(plan, tasks),
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
    registration, asked.folder = asked.registration.read_bytes(), asked.folder.resolve()
    os.chdir(HERE.parents[1])
    asked.folder = Path(os.path.relpath(asked.folder))  # it stands in the recipes of the secondary comparison
    plan = yaml.safe_load(registration)
    names = [task["name"] for task in plan["tasks"]]
    if not asked.report_only:
        recipes = [str(HERE / f"{task['recipe']}.yaml") for task in plan["tasks"]]
        study = StudyRequest(
            [*dict.fromkeys(recipes)], asked.folder, jobs=asked.jobs, report=ConsoleReporter(Console())
        )
        pilot = run_grid(runs_of(plan, plan["pilot_seeds"], names), study)
        widths = predicted_widths(plan, pilot)
        kept = [name for name in names if widths[name] < plan["required_width_percent"]]
        print(f"predicted widths in per cent: {widths}; continued: {kept}")
        run_grid(runs_of(plan, plan["seeds"], kept), study)
        run_grid(ruler_of(plan), study)
        start = start_of(plan)
        started = secondary_of(plan, asked.folder / start.folder / "adapter")
        if len(finished(started, asked.folder)) < len(started):
            if failure := execute(start.recipe, asked.folder / start.folder, threads=1).failure:
                raise LoraOverError(f"{start.name}, from which the others start: {failure}.")
            run_grid(started, study)
    found = report(plan, asked.folder, registration)
    publish_text(asked.folder / "replication.json", json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: found[key] for key in ("tasks", "verdict")}, indent=1))


if __name__ == "__main__":
    main()
