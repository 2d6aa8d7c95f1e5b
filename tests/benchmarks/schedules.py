"""What a schedule costs, and what it brings: SmolLM2-135M on GSM8K, 25 % of the sites, every schedule and score."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn

from loraover import Budget, LoraOverConfig, OverParameterization
from loraover.checkpoint import read_checkpoint
from loraover.command import quiet_libraries
from loraover.config import SCORE_NAMES
from loraover.progress import Reporter
from loraover.recipe import load_recipe
from loraover.run_result import read_run
from loraover.train import train

from benchmarks.statistics import median_ratio
from benchmarks.training import load
from real_data import data_folder

FRACTION = 0.25
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
def study(seeds: int, out: Path, only: str | None) -> None:
    """Train every schedule and score; finished runs are kept and not run again. Prints a table in Markdown."""
    quiet_libraries()
    data = data_folder() / "gsm8k"
    for seed in range(seeds):
        for method, settings in METHODS.items():
            folder = out / f"{method.replace(', ', '-').replace(' ', '-')}-{seed}"
            if (folder / "run.json").is_file() or (only is not None and only not in method):
                continue
            files = {"data.train": str(data / "train.jsonl.gz"), "data.test": str(data / "test.jsonl")}
            recipe = load_recipe("gsm8k-smollm2", {**SETTINGS, **files, "training.seed": seed, **settings})
            started = (folder / "recipe.yaml").is_file()
            train(recipe, folder, resume=started, report=Reporter(Console(stderr=True)), command="")
    print(table(out, seeds))


def table(out: Path, seeds: int) -> str:
    """Mean over seeds of held-out loss, step time and added parameters."""
    lines = [
        f"| schedule, score | held-out loss, {seeds} seeds | seconds a step | added parameters | extra forwards |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for method in METHODS:
        folders = [out / f"{method.replace(', ', '-').replace(' ', '-')}-{seed}" for seed in range(seeds)]
        runs = [read_run(folder) for folder in folders if (folder / "run.json").is_file()]
        losses = [run.after.loss for run in runs if run.after is not None]
        if not losses:
            continue
        forwards = 0
        if method != "plain LoRA":
            forwards = sum(found.forwards for found in read_checkpoint(folders[0] / "adapter").meta.rounds)
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        seconds = fmean(run.train_seconds / run.steps for run in runs)
        added = fmean(run.added_parameters for run in runs)
        lines.append(f"| {method} | {fmean(losses):.4f} ({each}) | {seconds:.2f} | {added:,.0f} | {forwards} |")
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
@click.option("--rounds", default=20, show_default=True, help="Paired steps after two of warm-up.")
@click.option("--json", "as_json", is_flag=True)
def cost(rounds: int, as_json: bool) -> None:
    """Step time of a dynamic schedule that still scores, over that of `all` on the same sites; and of one injection."""
    base, ids = load()
    found: dict[str, Any] = {}
    for score in ("fisher", "taylor", "sensitivity"):
        # Round 1 after the first step, round 2 far away: scores are observed in all steps that are timed.
        dynamic, step = make_arm(
            base,
            ids,
            LoraOverConfig(
                schedule="dynamic", score=score, budget=Budget(fraction=2 * FRACTION), rounds=2, start=0.001, end=0.9
            ),
        )
        step()
        while not dynamic.injected:
            step()
        plain, plain_step = make_arm(base, ids, LoraOverConfig(sites=list(dynamic.injected)))
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
        found[score] = {"ratio": ratio, "injection_s": injection, "sites": len(plain.injected), "times_s": times}
        if not as_json:
            injected = len(dynamic.injected) - len(plain.injected)
            print(
                f"{score}: {ratio[0]:.4f} [{ratio[1]:.4f}, {ratio[2]:.4f}] of the step time of `all` on the same "
                f"{len(plain.injected)} sites; scoring and injecting {injected} more took {injection:.2f} s"
            )
    if as_json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
