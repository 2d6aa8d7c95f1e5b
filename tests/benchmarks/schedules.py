"""Costs and benefits of every schedule and score: SmolLM2-135M on GSM8K, with cores for 25 % of the sites."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any

import click
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from loraover import Budget, LoraOverConfig, OverParameterization, Probe
from loraover.checkpoint.checkpoint import read_checkpoint
from loraover.common.command_line import quiet_libraries
from loraover.overparam.config import SCORE_NAMES
from loraover.overparam.importance.loss_impact import LossImpact
from loraover.reporting.reporter import ConsoleReporter
from loraover.training.recipe import load_recipe
from loraover.training.run import train
from loraover.training.run_result import read_run

from benchmarks.intervals import median_ratio
from benchmarks.training import load
from support.real_data import data_folder

FRACTION = 0.25
MOST_RATIO, MOST_INJECTION_S = 1.02, 1.0
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
        for score in SCORE_NAMES
    },
    "dynamic, fisher, moments afresh": {
        "over.schedule": "dynamic",
        "over.budget": {"fraction": FRACTION},
        "over.carry_moments": False,
    },
}


@click.group()
def main() -> None:
    """Measure schedules."""


@main.command()
@click.option("--seeds", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/schedules"), show_default=True)
@click.option("--only", help="Methods whose name holds this.")
@click.option("--jobs", default=1, show_default=True, help="Runs at a time, which share the processor's cores.")
def study(seeds: int, out: Path, only: str | None, jobs: int) -> None:
    """Train with every schedule and score, and print a table in Markdown; finished runs are not repeated."""
    out.mkdir(parents=True, exist_ok=True)
    runs = [(seed, method) for seed in range(seeds) for method in METHODS if only is None or only in method]
    with ProcessPoolExecutor(jobs, get_context("spawn"), _share_cores, (jobs,)) as pool:
        waiting = {pool.submit(train_one, method, seed, out): f"{method}, seed {seed}" for seed, method in runs}
        for done in as_completed(waiting):
            done.result()
            print(f"done: {waiting[done]}", file=sys.stderr)
    print(table(out, seeds))


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


def table(out: Path, seeds: int) -> str:
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


def make_step(model: Any, ids: Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], float]:
    def step() -> float:
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def make_arm(base: nn.Module, ids: Tensor, config: LoraOverConfig) -> tuple[OverParameterization, Callable[[], float]]:
    torch.manual_seed(0)
    model: Any = get_peft_model(
        deepcopy(base), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    over = OverParameterization(model, config, steps=1000)
    over.attach(optimizer)
    return over, make_step(model, ids, optimizer)


@main.command()
@click.option("--rounds", default=30, show_default=True, help="Paired steps after two of warm-up.")
@click.option("--json", "as_json", is_flag=True)
def cost(rounds: int, as_json: bool) -> None:
    """Step time of a dynamic schedule that still scores, over that of `all` on the same sites; and of one injection.

    Exits with 1 if a limit is exceeded: 1.02 of the step time, 1 s of an injection.
    """
    base, ids = load()
    found: dict[str, Any] = {}
    for score in ("fisher", "taylor", "sensitivity"):
        found[score] = measure(base, ids, score, rounds)
        if not as_json:
            print(f"{score}: {described(found[score])}", flush=True)
    over, _ = make_arm(base, ids, LoraOverConfig())
    found["loss_impact"] = {"forwards_a_batch": LossImpact(over.sites, 0).forwards(Probe(base, [ids]))}
    if as_json:
        print(json.dumps(found))
    else:
        print(f"loss_impact: {found['loss_impact']['forwards_a_batch']} forwards a batch at every decision")
    if any("exceeded" in numbers.get("verdicts", ()) for numbers in found.values()):
        sys.exit(1)


def measure(base: nn.Module, ids: Tensor, score: str, rounds: int) -> dict[str, Any]:
    """Paired steps of a schedule whose second round is far away, so that it scores in all of them; then that round."""
    dynamic, step = make_arm(
        base,
        ids,
        LoraOverConfig(
            schedule="dynamic", score=score, budget=Budget(fraction=2 * FRACTION), rounds=2, start=0.001, end=0.9
        ),
    )
    while not dynamic.injected:
        step()
    names = list(dynamic.injected)
    _, plain_step = make_arm(base, ids, LoraOverConfig(sites=names))
    times: dict[str, list[float]] = {"dynamic": [], "all": []}
    draw = random.Random(0)
    for number in range(rounds + 2):
        for name, take in draw.sample([("dynamic", step), ("all", plain_step)], 2):
            seconds = take()
            if number >= 2:
                times[name].append(seconds)
    assert dynamic.schedule.observed is not None
    started = time.perf_counter()
    dynamic._hold_round()
    injection = time.perf_counter() - started
    ratio = median_ratio(times["dynamic"], times["all"])
    return {
        "ratio": ratio,
        "injection_s": injection,
        "sites": len(names),
        "injected": len(dynamic.injected) - len(names),
        "verdicts": [verdict(ratio[1], ratio[2], MOST_RATIO), verdict(injection, injection, MOST_INJECTION_S)],
        "times_s": times,
    }


def verdict(low: float, high: float, limit: float) -> str:
    """Of an interval that holds the true value."""
    return "kept" if high <= limit else "exceeded" if low > limit else "undecided, take more rounds"


def described(found: dict[str, Any]) -> str:
    ratio, low, high = found["ratio"]
    return (
        f"{ratio:.4f} [{low:.4f}, {high:.4f}] of the step time of `all` on the same {found['sites']} sites "
        f"(limit {MOST_RATIO}: {found['verdicts'][0]}); scoring and injecting {found['injected']} more took "
        f"{found['injection_s']:.2f} s (limit {MOST_INJECTION_S:g} s: {found['verdicts'][1]})"
    )


if __name__ == "__main__":
    main()
