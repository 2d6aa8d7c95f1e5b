"""Host time and number of operations that LoRA-Over adds to an optimizer step, beside fused AdamW on A and B alone.

The model has the layers of Llama-3.1-8B (448 sites) and tiny dimensions, so that the time is that of Python and of
launching operations, which is what an accelerator waits for. Steps alternate in one process.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import click
import torch
from peft import LoraConfig, get_peft_model
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from loraover import LoraOverConfig, OverParameterization

from benchmarks.intervals import median_ratio

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
ARMS: dict[str, dict[str, Any] | None] = {
    "fused AdamW on A and B": None,
    "mpo": {"decomposition": "mpo"},
    "eigen, no refresh": {"decomposition": "eigen", "options": {"refresh": EVERY_STEP}},
    "eigen, bases at rest": {"decomposition": "eigen", "options": {"short": "none", "long": "none"}},
}


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


def make_step(config: dict[str, Any] | None) -> tuple[Callable[[], float], Callable[[], _Counting]]:
    """Functions that take one optimizer step: its seconds, and its operations."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            num_hidden_layers=32,
            num_attention_heads=4,
            num_key_value_heads=1,
            intermediate_size=224,
            vocab_size=64,
        )
    )
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
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

    def timed() -> float:
        give()
        started = time.perf_counter()
        take()
        return time.perf_counter() - started

    def counted() -> _Counting:
        give()
        counting = _Counting()
        with counting:
            take()
        return counting

    return timed, counted


@click.command()
@click.option("--rounds", default=60, show_default=True, help="Paired steps after five warm-up steps.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(rounds: int, as_json: bool) -> None:
    """Compare the host time of optimizer steps."""
    torch.set_num_threads(1)
    steps = {arm: make_step(config) for arm, config in ARMS.items()}
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(rounds + 5):
        for arm, (timed, _) in steps.items():
            seconds = timed()
            if number >= 5:
                times[arm].append(seconds)
    counts = {arm: counted() for arm, (_, counted) in steps.items()}
    first = next(iter(ARMS))
    ratios = {arm: median_ratio(times[arm], times[first]) for arm in ARMS}
    if as_json:
        operations = {arm: (count.operations(), count.readings()) for arm, count in counts.items()}
        print(json.dumps({"times_s": times, "ratio": ratios, "operations_and_readings": operations}))
        return
    table = Table(box=SIMPLE, title=f"Optimizer step with 448 sites, one thread, {rounds} paired steps")
    for column in ("", "median", "ratio [95 %]", "operations", "values read"):
        table.add_column(column, justify="left" if not column else "right")
    for arm in ARMS:
        ratio, low, high = ratios[arm]
        milliseconds = 1000 * statistics.median(times[arm])
        shown = f"{ratio:.2f} [{low:.2f}, {high:.2f}]"
        table.add_row(arm, f"{milliseconds:.2f} ms", shown, str(counts[arm].operations()), str(counts[arm].readings()))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
