"""Costs and benefits of every schedule and score: SmolLM2-135M on GSM8K, with cores for 25 % of the sites."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any

import click
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from loraover import Budget, LoraOverConfig, OverParameterization, Probe
from loraover.checkpoint.checkpoint import read_checkpoint
from loraover.common.command_line import quiet_libraries
from loraover.overparam.importance import SCORES
from loraover.overparam.importance.loss_impact import LossImpact
from loraover.reporting.reporter import ConsoleReporter
from loraover.training.recipe import load_recipe
from loraover.training.run import train
from loraover.training.run_result import read_run

from benchmarks.clock import timed
from benchmarks.intervals import Ratio, median_ratio
from benchmarks.settings import SMOL
from benchmarks.training import Step, add_lora, load, step_of
from support.real_data import data_folder

FRACTION = 0.25
MOST_RATIO, MOST_DECISION_S = 1.02, 1.0
WARM_UP = 2
STEPS_FILE = "step_seconds.json"
STEPS = 24
SETTINGS: dict[str, Any] = {
    "training.max_steps": STEPS,
    "data.train_examples": 200,
    "training.max_length": 96,
    "training.per_device_train_batch_size": 2,
    "training.learning_rate": 1e-3,
    "training.save_steps": 1000,
    "evaluation.examples": 24,
    "over.calibration_batches": 1,
}
METHODS: dict[str, dict[str, Any]] = {
    "plain LoRA": {"method": "lora"},
    "all": {},
    **{
        f"{schedule}, {score}": {
            "over.schedule": schedule,
            "over.score": score,
            "over.budget": {"fraction": FRACTION},
        }
        for schedule in ("static", "dynamic")
        for score in SCORES
    },
    "dynamic, fisher, moments afresh": {
        "over.schedule": "dynamic",
        "over.budget": {"fraction": FRACTION},
        "over.carry_moments": False,
    },
}


@click.command()
@click.option("--seeds", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/schedules"), show_default=True)
@click.option("--only", help="Methods whose name holds this.")
@click.option("--jobs", default=1, show_default=True, help="Runs at a time, which share the processor's cores.")
def main(seeds: int, out: Path, only: str | None, jobs: int) -> None:
    """Train with every schedule and score, and print a table in Markdown; finished runs are not repeated."""
    out.mkdir(parents=True, exist_ok=True)
    runs = [(seed, method) for seed in range(seeds) for method in METHODS if only is None or only in method]
    with ProcessPoolExecutor(jobs, get_context("spawn"), _share_cores, (jobs,)) as pool:
        waiting = {pool.submit(train_one, method, seed, out): f"{method}, seed {seed}" for seed, method in runs}
        for done in as_completed(waiting):
            done.result()
            print(f"done: {waiting[done]}", file=sys.stderr)
    print(study_table(out, seeds))


def _share_cores(jobs: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


def train_one(method: str, seed: int, out: Path) -> None:
    """Train or resume a run unless it is finished; its output goes to a log beside its folder."""
    folder = run_folder(out, method, seed)
    if (folder / "run.json").is_file():
        return
    quiet_libraries()
    data = data_folder() / "gsm8k"
    files = {"data.train": str(data / "train.jsonl.gz"), "data.test": str(data / "test.jsonl")}
    recipe = load_recipe("gsm8k-smollm2", {**SETTINGS, **files, "training.seed": seed, **METHODS[method]})
    started = (folder / "recipe.yaml").is_file()
    with folder.with_suffix(".log").open("a") as log, steps_timed() as seconds:
        train(recipe, folder, resume=started, report=ConsoleReporter(Console(file=log)), command="")
    (folder / STEPS_FILE).write_text(json.dumps(seconds))


def run_folder(out: Path, method: str, seed: int) -> Path:
    return out / f"{method.replace(', ', '-').replace(' ', '-')}-{seed}"


@contextmanager
def steps_timed() -> Iterator[list[float]]:
    """Seconds from the end of each step to the end of the next, of the optimizer that steps last in the block."""
    ends: dict[int, list[float]] = {}
    seconds: list[float] = []

    def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        ends.setdefault(id(optimizer), []).append(time.perf_counter())

    handle = register_optimizer_step_post_hook(note)
    try:
        yield seconds
    finally:
        handle.remove()
    last = max(ends.values(), key=lambda times: times[-1], default=[])
    seconds += [after - before for before, after in pairwise(last)]


def study_table(out: Path, seeds: int) -> str:
    """Summarise finished runs: held-out losses, median time of a step, mean added parameters, forwards."""
    lines = [
        "| schedule, score | held-out loss (each seed) | median step, s | added parameters | extra forwards |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for method in METHODS:
        folders = [run_folder(out, method, seed) for seed in range(seeds)]
        done = [folder for folder in folders if (folder / STEPS_FILE).is_file()]
        runs = [read_run(folder) for folder in done]
        losses = [run.after.loss for run in runs if run.after is not None]
        if not losses:
            continue
        forwards = 0
        if method != "plain LoRA":
            forwards = max(sum(r.forwards for r in read_checkpoint(f / "adapter").meta.rounds) for f in done)
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        seconds = [time for folder in done for time in json.loads((folder / STEPS_FILE).read_text())]
        added = fmean(run.added_parameters for run in runs)
        lines.append(
            f"| {method} | {fmean(losses):.4f} ({each}) | {median(seconds):.2f} | {added:,.0f} | {forwards:,} |"
        )
    return "\n".join(lines)


def make_arm(base: nn.Module, ids: Tensor, config: LoraOverConfig) -> tuple[OverParameterization, Step]:
    """Make a model that is trained with a schedule, and the function that takes one training step."""
    model, optimizer = add_lora(base)
    over = OverParameterization(model, config, steps=1000)
    over.attach(optimizer)
    return over, step_of(model, optimizer, ids)


@dataclass(frozen=True)
class Cost:
    """What a score costs.

    Args:
        ratio: Step time while a dynamic schedule still scores, over that of `all` on the same sites.
        decision_s: Seconds to score all sites and give cores to more of them.
        sites: Number of sites with cores during the steps.
        injected: Number of sites that get cores in the decision.
    """

    ratio: Ratio
    decision_s: float
    sites: int
    injected: int


def measure(rounds: int = 24) -> Iterator[Table]:
    """Compare the steps of a dynamic schedule that still scores with those of `all` on the same sites."""
    base, ids = load()
    costs = {score: time_score(base, ids, score, rounds) for score in ("fisher", "taylor", "sensitivity")}
    over, _ = make_arm(base, ids, LoraOverConfig())
    forwards = LossImpact(over.sites, 0).forwards(Probe(base, [ids]))
    (sites,) = {cost.sites for cost in costs.values()}
    table = Table(
        box=SIMPLE,
        title=f"Schedules: SmolLM2-135M, {SMOL.batch} x {SMOL.length} tokens, {rounds} paired steps",
        caption=f"`loss_impact` costs nothing between decisions, and {forwards} forwards a batch at each of them.",
    )
    peer = f"step / `all` on the same {sites} sites [95 %]"
    for column in ("score", peer, f"at most {MOST_RATIO}?", "one decision", f"at most {MOST_DECISION_S:g} s?"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for score, cost in costs.items():
        table.add_row(
            score,
            cost.ratio.shown(4),
            verdict(cost.ratio.low, cost.ratio.high, MOST_RATIO),
            f"{cost.decision_s:.2f} s, {cost.injected} sites",
            verdict(cost.decision_s, cost.decision_s, MOST_DECISION_S),
        )
    yield table


def time_score(base: nn.Module, ids: Tensor, score: str, rounds: int) -> Cost:
    """Paired steps of a schedule whose second round is far away, so that it scores in all of them; then that round."""
    budget = Budget(fraction=2 * FRACTION)
    config = LoraOverConfig(schedule="dynamic", score=score, budget=budget, rounds=2, start=0.001, end=0.9)
    dynamic, step = make_arm(base, ids, config)
    while not dynamic.injected:
        step()
    names = list(dynamic.injected)
    _, plain_step = make_arm(base, ids, LoraOverConfig(sites=names))
    times: dict[str, list[float]] = {"dynamic": [], "all": []}
    draw = random.Random(0)
    for number in range(rounds + WARM_UP):
        for name, take in draw.sample([("dynamic", step), ("all", plain_step)], 2):
            seconds = timed(take, ids.device).whole
            if number >= WARM_UP:
                times[name].append(seconds)
    assert dynamic.schedule.observed is not None
    decision = timed(dynamic._hold_round, ids.device).whole
    ratio = median_ratio(times["dynamic"], times["all"])
    return Cost(ratio, decision, len(names), len(dynamic.injected) - len(names))


def verdict(low: float, high: float, limit: float) -> str:
    """Say whether an interval that holds the true value keeps a limit."""
    return "yes" if high <= limit else "no" if low > limit else "undecided"


if __name__ == "__main__":
    main()
