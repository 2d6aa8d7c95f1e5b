"""Step time and peak memory of plain LoRA, LoRA-Over and naive autograd through the cores.

Times come from one process in which the arms take turns in random order, so that a ratio compares steps that were
taken within seconds of one another; they share the base model's weights. Peak memory comes from a separate process for
each. The physical limit is the time of the multiplications in the forward and backward pass, at the rate of a large
matrix product of the same round; that of memory is what plain LoRA has to hold between two steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from loraover import LoraOverConfig, OverParameterization, Probe
from loraover.common.command_line import quiet_libraries
from loraover.common.provenance import peak_bytes
from loraover.models.load import load_model, resolve_model
from loraover.overparam.core_group import CoreGroup
from loraover.overparam.decompositions.eigen import Eigen
from loraover.overparam.sites import find_sites

from benchmarks.clock import find_device, timed
from benchmarks.intervals import median_ratio
from benchmarks.processes import in_child
from benchmarks.settings import EIGEN, NAIVE, PLAIN, SMOL, Setting
from benchmarks.shapes import SIZES
from benchmarks.shown import Numbers, table_of

CONFIGS = {"mpo": LoraOverConfig()} | {
    arm: LoraOverConfig(decomposition="eigen", options={**options, "refresh": 10**6}) for arm, options in EIGEN.items()
}
"""LoRA-Over with each gauge; the bases of eigen are followed and not refreshed, which is timed by itself."""
LIMIT = "products alone"
PEERS = (PLAIN, "mpo", LIMIT)
WARM_UP, MEMORY_STEPS, CALIBRATION_BATCHES = 1, 3, 4
WITHOUT_GAPS = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}
"""Variables by which glibc gives freed blocks back at once; else its heap keeps gaps, more with mixed block sizes."""
WHOLE_RUN = 300
"""Optimizer steps with which the cost of bases is compared."""

Step = Callable[[], object]


class Contraction(nn.Module):
    """Parametrization of one A or B matrix by its cores, in the autograd graph."""

    def __init__(self, group: CoreGroup) -> None:
        super().__init__()
        self.decomposition, self.shape = group.decomposition, group.shape
        self.cores = nn.ParameterList([stack[0].clone() for stack in group.stacks])

    def forward(self, matrix: Tensor) -> Tensor:
        return self.decomposition.contract([core.unsqueeze(0) for core in self.cores], *self.shape)[0]


def add_lora(base: nn.Module, rank: int = SMOL.rank) -> tuple[Any, torch.optim.Optimizer]:
    """Add LoRA to all linear layers of a copy that shares the weights, and make the optimizer that trains it."""
    torch.manual_seed(0)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(deepcopy(base, {id(p): p for p in base.parameters()}), lora)
    model.train()
    if next(base.parameters()).dtype == torch.bfloat16:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, optimizer_of(model)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)


def step_of(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> Step:
    """Return a function that takes one training step; on a base in bfloat16 it computes in that."""
    is_short = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())

    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=is_short):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_step(arm: str, base: nn.Module, ids: Tensor, setting: Setting) -> Step:
    """Return a function that takes one training step of an arm."""
    model, optimizer = add_lora(base, setting.rank)
    if arm == NAIVE:
        config = LoraOverConfig()
        owners = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear)}
        for site in find_sites(model).values():
            group = CoreGroup.initialised([site], config.make_decomposition(), 0, 0)
            owner = owners[id(site.parameter)]
            site.parameter.requires_grad_(False)
            parametrize.register_parametrization(owner, "weight", Contraction(group), unsafe=True)
        optimizer = optimizer_of(model)
    if arm in CONFIGS:
        over_parameterize(arm, model, ids).attach(optimizer)
    return step_of(model, optimizer, ids)


def over_parameterize(arm: str, model: Any, ids: Tensor) -> OverParameterization:
    probe = Probe(model, [{"input_ids": ids, "labels": ids}] * CALIBRATION_BATCHES)
    return OverParameterization(model, CONFIGS[arm], probe=probe)


def time_steps(base: nn.Module, ids: Tensor, setting: Setting) -> dict[str, dict[int, float]]:
    """Return the seconds of every arm's steps, and those that their multiplications take, by round."""
    turns, size = setting.turns, setting.square
    steps = {arm: make_step(arm, base, ids, setting) for arm in turns}
    with FlopCounterMode(display=False) as counted:
        steps[PLAIN]()
    products = counted.get_total_flops() / (2 * size**3)
    square = torch.ones(size, size, device=ids.device, dtype=next(base.parameters()).dtype)
    seconds: dict[str, dict[int, float]] = {arm: {} for arm in (*turns, LIMIT)}
    draw = random.Random(0)
    for number in range(-WARM_UP, setting.rounds):
        for arm in draw.sample(list(turns), len(turns)):
            if number < 0 or number % turns[arm] == 0:
                seconds[arm][number] = timed(steps[arm], ids.device).whole
        seconds[LIMIT][number] = products * timed(lambda: square @ square, ids.device).whole
    return {arm: {number: s for number, s in found.items() if number >= 0} for arm, found in seconds.items()}


def basis_seconds(arm: str, base: nn.Module, ids: Tensor, setting: Setting = SMOL) -> dict[str, float]:
    """Seconds of what the bases of an arm cost beside its steps: each part, and all parts of a run."""
    model, optimizer = add_lora(base, setting.rank)
    made: list[OverParameterization] = []
    injection = timed(lambda: made.append(over_parameterize(arm, model, ids)), ids.device).whole
    over = made[0].attach(optimizer)
    step = step_of(model, optimizer, ids)
    for _ in range(2):
        step()
    followers = over.followers.values()

    def refresh() -> None:
        for follower in followers:
            follower.refresh()

    found = {"injection, with its calibration": injection}
    for name in ("first bases", "a refresh"):
        for follower in followers:
            follower.seen.fill_(10**6)  # as if the gradients had spanned every block
            follower.due = follower.steps
        found[name] = timed(refresh, ids.device).whole
    number = number_of_refreshes()
    whole = injection + found["first bases"] + (number - 1) * found["a refresh"]
    return found | {f"all of these, with {number} refreshes": whole}


def number_of_refreshes() -> int:
    """How many refreshes eigen has by default in a whole run."""
    due, found = Eigen().refresh, 0
    while due <= WHOLE_RUN:
        due, found = Eigen().bases.rule.next_refresh(due), found + 1
    return found


def load(setting: Setting = SMOL) -> tuple[Any, Tensor]:
    """Return the base model and the tokens of a batch, on the device of the benchmarks."""
    quiet_libraries()
    device, sizes = find_device(), SIZES.get(setting.model)
    base: Any = load_model(resolve_model(setting.model)).to(device) if sizes is None else sizes.random_model(device)
    shape, draw = (setting.batch, setting.length), torch.Generator().manual_seed(0)
    return base, torch.randint(base.config.vocab_size, shape, generator=draw).to(device)


def peak_memory_bytes(arm: str, setting: Setting) -> int:
    """Train one arm for a few steps, and return the peak memory of this process."""
    base, ids = load(setting)
    step = make_step(arm, base, ids, setting)
    for _ in range(MEMORY_STEPS):
        step()
    return peak_bytes()


def held_bytes(base: nn.Module, rank: int) -> int:
    """Return the bytes of the weights, of A and B in float32, and of their gradients and AdamW's two moments."""
    model, _ = add_lora(base, rank)
    trained: int = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return sum(parameter.nbytes for parameter in base.parameters()) + 4 * 4 * trained


def measure(setting: Setting = SMOL) -> Iterator[Table | Numbers]:
    """Compare plain LoRA, LoRA-Over and naive autograd through the cores."""
    memory = {arm: in_child(peak_memory_bytes, arm, setting) for arm in setting.turns}
    held = {
        arm: in_child(peak_memory_bytes, arm, setting, environment=WITHOUT_GAPS)
        for arm in (setting.turns if find_device().type == "cpu" else ())
    }
    base, ids = load(setting)
    memory[LIMIT] = held_bytes(base, setting.rank)
    seconds = time_steps(base, ids, setting)
    yield step_table(seconds, memory, setting)
    figures = {"step_seconds": {arm: list(found.values()) for arm, found in seconds.items()}, "peak_bytes": memory}
    if held:
        yield memory_table(held)
        figures["held_bytes"] = held
    yield figures
    arms = [arm for arm in EIGEN if arm in setting.turns]
    yield basis_table({arm: basis_seconds(arm, base, ids, setting) for arm in arms}, median(seconds[PLAIN].values()))


def step_table(seconds: Mapping[str, Mapping[int, float]], memory: Mapping[str, int], setting: Setting) -> Table:
    """Show the time of a step beside plain LoRA's and the limit, and the peak memory."""
    steps = ", ".join(f"{len(seconds[arm])} of {arm}" for arm in setting.turns)
    table = table_of(
        f"{setting.model.rpartition('/')[2]}, {setting.batch} x {setting.length} tokens, r = {setting.rank}, "
        "all linear layers",
        *("", "median", *(f"step / {peer} [95 %]" for peer in PEERS), "peak memory", "/ LoRA"),
        caption=f"Paired steps: {steps}. Limits: {LIMIT}; of memory, the weights, A, B, their gradients and moments.",
    )
    for arm, found in seconds.items():
        ratios = [
            median_ratio(list(found.values()), [seconds[peer][number] for number in found]).shown(3) for peer in PEERS
        ]
        used = f"{memory[arm] / 2**20:.0f} MiB", f"{memory[arm] / memory[PLAIN]:.3f}"
        table.add_row(arm, f"{median(found.values()):.3f} s", *ratios, *used)
    return table


def memory_table(held: Mapping[str, int]) -> Table:
    """Show the peak memory of processes whose C library keeps no freed memory."""
    caption = "Peak memory of processes in which the C library gives all freed memory back."
    table = table_of("Memory held at once", "", "MiB", "/ LoRA", caption=caption)
    for arm, used in held.items():
        table.add_row(arm, f"{used / 2**20:.0f}", f"{used / held[PLAIN]:.3f}")
    return table


def basis_table(seconds: Mapping[str, Mapping[str, float]], plain: float) -> Table:
    """Show what the bases of eigen cost beside whole runs of plain LoRA."""
    caption = f"Each part timed once. In brackets, its share of {WHOLE_RUN} steps of LoRA."
    table = table_of("Bases of eigen", "", *seconds, caption=caption)
    for name in seconds["eigen"]:
        parts = (found[name] for found in seconds.values())
        table.add_row(name, *(f"{taken:.2f} s ({taken / (WHOLE_RUN * plain):.2%})" for taken in parts))
    return table
