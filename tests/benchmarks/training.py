"""Step time and peak memory of plain LoRA, LoRA-Over and naive autograd through the cores, on SmolLM2-135M.

Times come from one process in which the three take turns in random order, so that a ratio compares steps that were
taken within seconds of one another. Peak memory comes from a process of its own for each.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import click
import torch
from peft import LoraConfig, get_peft_model
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize

from loraover import LoraOverConfig, OverParameterization, Probe
from loraover.common.command_line import quiet_libraries
from loraover.models.load import load_model, resolve_model
from loraover.overparam.core_group import CoreGroup
from loraover.overparam.sites import find_sites

from benchmarks.intervals import median_ratio

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BATCH, LENGTH, RANK = 8, 64, 8
ARMS = ("LoRA", "mpo", "eigen", "naive autograd")
CONFIGS = {"mpo": LoraOverConfig(), "eigen": LoraOverConfig(decomposition="eigen", options={"refresh": 10**6})}
"""LoRA-Over with each gauge; the bases of eigen are followed and not refreshed, which is timed by itself."""

Step = Callable[[], float]


class Contraction(nn.Module):
    """Parametrization of one A or B matrix by its cores, in the autograd graph."""

    def __init__(self, group: CoreGroup) -> None:
        super().__init__()
        self.decomposition, self.shape = group.decomposition, group.shape
        self.cores = nn.ParameterList([stack[0].clone() for stack in group.stacks])

    def forward(self, matrix: Tensor) -> Tensor:
        return self.decomposition.contract([core.unsqueeze(0) for core in self.cores], *self.shape)[0]


def make_step(arm: str, base: nn.Module, ids: Tensor) -> Step:
    """A function that takes one training step of an arm and returns its seconds."""
    torch.manual_seed(0)
    model: Any = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.train()
    config = LoraOverConfig()
    if arm == "naive autograd":
        owners = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear)}
        for site in find_sites(model).values():
            group = CoreGroup.initialised([site], config.make_decomposition(), 0, 0)
            owner = owners[id(site.parameter)]
            site.parameter.requires_grad_(False)
            parametrize.register_parametrization(owner, "weight", Contraction(group), unsafe=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    if arm in CONFIGS:
        OverParameterization(model, CONFIGS[arm]).attach(optimizer)

    def step() -> float:
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def basis_seconds(base: nn.Module, ids: Tensor) -> dict[str, float]:
    """Seconds of the first bases of all sites, of a later refresh, and of a calibration on four batches."""
    torch.manual_seed(0)
    lora = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    over = OverParameterization(model, CONFIGS["eigen"]).attach(optimizer)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {}
    for name in ("first bases", "a refresh"):
        for follower in over.followers.values():
            follower.seen.fill_(10**6)  # as if the gradients had spanned every block
            follower.due = follower.steps
        started = time.perf_counter()
        for follower in over.followers.values():
            follower.refresh()
        found[name] = time.perf_counter() - started
    over.detach()
    config = LoraOverConfig(decomposition="eigen", options={"long": "calibration"})
    started = time.perf_counter()
    OverParameterization(model, config, probe=Probe(model, [{"input_ids": ids, "labels": ids}] * 4))
    return found | {"calibration": time.perf_counter() - started}


def load() -> tuple[nn.Module, Tensor]:
    quiet_libraries()
    base = load_model(resolve_model(MODEL))
    ids = torch.randint(base.config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    return base, ids


def peak_memory_bytes(arm: str, steps: int) -> int:
    """Peak resident memory of a process that trains one arm."""
    command = [sys.executable, "-m", "benchmarks.training", "--memory-of", arm, "--rounds", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@click.command()
@click.option("--rounds", default=20, show_default=True, help="Paired rounds after two warm-up rounds.")
@click.option("--memory-of", type=click.Choice(ARMS), hidden=True)
@click.option("--json", "as_json", is_flag=True)
def main(rounds: int, memory_of: str | None, as_json: bool) -> None:
    """Compare plain LoRA, LoRA-Over and naive autograd through the cores."""
    if memory_of is not None:
        base, ids = load()
        step = make_step(memory_of, base, ids)
        for _ in range(rounds):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    # Before this process grows: a child's peak starts from its parent's.
    memory = {arm: peak_memory_bytes(arm, 3) for arm in ARMS}
    base, ids = load()
    steps = {arm: make_step(arm, deepcopy(base), ids) for arm in ARMS}
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    order, draw = list(ARMS), random.Random(0)
    for number in range(rounds + 2):
        draw.shuffle(order)
        for arm in order:
            seconds = steps[arm]()
            if number >= 2:
                times[arm].append(seconds)
    ratios = {arm: median_ratio(times[arm], times["LoRA"]) for arm in ARMS}
    bases = basis_seconds(deepcopy(base), ids)
    if as_json:
        print(json.dumps({"times_s": times, "peak_bytes": memory, "time_ratio": ratios, "basis_s": bases}))
        return
    title = f"{MODEL}, {BATCH} x {LENGTH} tokens, r = {RANK}, all linear layers, {rounds} paired steps"
    table = Table(box=SIMPLE, title=title)
    for column in ("", "median step", "ratio to LoRA [95 %]", "peak memory", "ratio"):
        table.add_column(column)
    for arm in ARMS:
        ratio, low, high = ratios[arm]
        table.add_row(
            arm,
            f"{sorted(times[arm])[len(times[arm]) // 2]:.3f} s",
            f"{ratio:.3f} [{low:.3f}, {high:.3f}]",
            f"{memory[arm] / 2**20:.0f} MiB",
            f"{memory[arm] / memory['LoRA']:.3f}",
        )
    console = Console(width=110)
    console.print(table)
    plain = sorted(times["LoRA"])[len(times["LoRA"]) // 2]
    for name, seconds in bases.items():
        console.print(f"eigen, {name}: {seconds:.1f} s, {seconds / (300 * plain):.2%} of 300 steps of plain LoRA")


if __name__ == "__main__":
    main()
