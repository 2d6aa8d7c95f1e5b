"""Host time and number of operations that LoRA-Over adds to an optimizer step, beside fused AdamW on A and B alone.

The models have the layers of a Llama (14 sites in each) and tiny dimensions, so that the time is that of Python and of
launching operations, which is what an accelerator waits for. Steps alternate in one process. On a GPU, the time until
the device has finished a step is shown as well.
"""

from __future__ import annotations

import gc
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from loraover import LoraOverConfig, OverParameterization

from benchmarks.clock import Seconds, find_device, timed
from benchmarks.intervals import median_interval, median_ratio
from benchmarks.shown import Plot, Point, Shown, draw_curves, table_of

VIEWS = (
    "alias",
    "as_strided",
    "detach",
    "expand",
    "permute",
    "select",
    "slice",
    "squeeze",
    "transpose",
    "unbind",
    "view",
)
MEASURED = ("_record_function", "_local_scalar_dense")
EVERY_STEP = 10**6  # steps until a refresh: none falls into the measurement
PLAIN = "fused AdamW on A and B"
EIGEN = "eigen, no refresh"
ARMS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "mpo": {"decomposition": "mpo"},
    EIGEN: {"decomposition": "eigen", "options": {"refresh": EVERY_STEP}},
    "eigen, bases at rest": {"decomposition": "eigen", "options": {"short": "none", "long": "none"}},
}
LAYERS, SITES_A_LAYER = 32, 14
CURVE = (PLAIN, "mpo", EIGEN)
CURVE_LAYERS = (2, 5, 10, 20, 40, 80, 143)
WARM_UP = 5

_Mode: Any = TorchDispatchMode  # whose methods have no types


class _Counting(_Mode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))

    def operations(self) -> int:
        """Operations that launch work: neither views nor readings of a value."""
        return sum(n for name, n in self.found.items() if not any(word in name for word in (*VIEWS, *MEASURED)))

    def readings(self) -> int:
        """Readings of a value, each of which waits for an accelerator."""
        return self.found["_local_scalar_dense"]


class Step(NamedTuple):
    """One optimizer step of an arm, to be taken many times."""

    timed: Callable[[], Seconds]
    counted: Callable[[], _Counting]


def make_step(config: dict[str, Any] | None, layers: int, device: torch.device) -> Step:
    """Make the optimizer step of a model with that many layers; None: plain LoRA."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=1,
            intermediate_size=224,
            vocab_size=64,
        )
    )
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    if config is not None:
        OverParameterization(model, LoraOverConfig(**config)).attach(optimizer)
    gradients = [torch.randn_like(p) for p in parameters]

    def take() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def give() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()

    def take_timed() -> Seconds:
        give()
        return timed(take, device)

    def take_counted() -> _Counting:
        give()
        counting = _Counting()
        with counting:
            take()
        return counting

    return Step(take_timed, take_counted)


def alternate(steps: Mapping[str, Step], rounds: int) -> dict[str, list[Seconds]]:
    """Take the steps of all arms in turn, and return their seconds after the warm-up."""
    found: dict[str, list[Seconds]] = {arm: [] for arm in steps}
    for _ in range(rounds + WARM_UP):
        for arm, step in steps.items():
            found[arm].append(step.timed())
    return {arm: seconds[WARM_UP:] for arm, seconds in found.items()}


def measure(rounds: int = 60, curve_layers: Sequence[int] = CURVE_LAYERS, curve_rounds: int = 40) -> Iterator[Shown]:
    """Compare optimizer steps: of a model with as many sites as Llama-3.1-8B, and of smaller and larger ones."""
    threads, device = torch.get_num_threads(), find_device()
    torch.set_num_threads(1)
    try:
        steps = {arm: make_step(config, LAYERS, device) for arm, config in ARMS.items()}
        seconds = alternate(steps, rounds)
        yield step_table(seconds, {arm: step.counted() for arm, step in steps.items()}, rounds, device)
        del steps
        curves = {}
        for layers in curve_layers:
            gc.collect()
            steps = {arm: make_step(ARMS[arm], layers, device) for arm in CURVE}
            curves[layers * SITES_A_LAYER] = alternate(steps, curve_rounds)
            del steps
        yield curve_table(curves, curve_rounds)
        yield curve_plot(curves)
    finally:
        torch.set_num_threads(threads)


def step_table(
    seconds: Mapping[str, Sequence[Seconds]], counts: Mapping[str, _Counting], rounds: int, device: torch.device
) -> Table:
    """Show times, their ratios to plain AdamW, and operations."""
    kinds = ["host"] if device.type == "cpu" else ["host", "whole"]
    title = f"Optimizer step with {LAYERS * SITES_A_LAYER} sites, one thread, {rounds} paired steps"
    endings = ["" if kind == "host" else ", finished" for kind in kinds]
    columns = [column for ending in endings for column in (f"median{ending}", f"ratio [95 %]{ending}")]
    table = table_of(title, "", *columns, "operations", "values read")
    for arm, found in seconds.items():
        cells = []
        for kind in kinds:
            mine, plain = [[getattr(s, kind) for s in times] for times in (found, seconds[PLAIN])]
            cells += [_milliseconds(mine), median_ratio(mine, plain).shown()]
        table.add_row(arm, *cells, str(counts[arm].operations()), str(counts[arm].readings()))
    return table


Curves = Mapping[int, Mapping[str, Sequence[Seconds]]]
"""Seconds of each arm, by the number of sites."""


def curve_table(curves: Curves, rounds: int) -> Table:
    """Show the host time of a step at every number of sites."""
    table = table_of(
        f"Host time of an optimizer step, {rounds} paired steps at each number of sites",
        *("sites", "AdamW", "mpo", "mpo / AdamW [95 %]", "eigen", "eigen / AdamW [95 %]"),
        words=0,
        caption=f"AdamW: {PLAIN}. eigen: {EIGEN.removeprefix('eigen, ')}.",
    )
    for sites, seconds in curves.items():
        plain, mpo, eigen = ([s.host for s in seconds[arm]] for arm in CURVE)
        cells = [_milliseconds(plain)]
        for mine in (mpo, eigen):
            cells += [_milliseconds(mine), median_ratio(mine, plain).shown()]
        table.add_row(f"{sites:,}", *cells)
    return table


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{1000 * statistics.median(seconds):.2f} ms"


def curve_plot(curves: Curves) -> Plot:
    """Draw the host time of a step against the number of sites."""
    points: dict[str, list[Point]] = {arm: [] for arm in CURVE}
    for sites, seconds in curves.items():
        for arm in CURVE:
            points[arm].append(Point(sites, *median_interval([1000 * s.host for s in seconds[arm]])[:3]))
    svg = draw_curves(
        points, x="sites", y="host time of an optimizer step, ms", ticks=(30, 100, 300, 1000, 2000), names=",.0f"
    )
    description = f"Host time of an optimizer step against the number of sites, {min(curves)} to {max(curves):,}."
    return Plot("step-overhead", f"{description} The numbers are in the table above.", svg)
