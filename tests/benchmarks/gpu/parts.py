"""The measurements of `make gpu`, in their order, and the same ones so small that a CPU takes them in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.exactness import FILES
from benchmarks.settings import PLAIN, Setting

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """One measurement, in a process of its own.

    Args:
        title: Its heading on the page.
        module: Module of `benchmarks` that has it as the function `measure`.
        limit_s: Seconds after which it is ended.
        card: Arguments of `measure` for a GPU with 80 GB.
        tiny: Arguments of `measure` for a CPU; None: another measurement tries the same.
    """

    title: str
    module: str
    limit_s: float
    card: Options
    tiny: Options | None

    def options(self, plan: str) -> Options | None:
        """Return the arguments of a plan, "card" or "tiny"; None: the plan is without this measurement."""
        return self.card if plan == "card" else self.tiny


DEVICES = {"card": "cuda", "tiny": "cpu"}
"""Device of each plan."""

SMALL, LARGE = "Llama-3.2-1B", "Llama-3.1-8B"
ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
HALF = ("--gpu-memory-utilization", "0.5")
"""Options of vLLM that leave half of the GPU to PyTorch."""


def step(size: str, limit_s: float, rounds: int, tiny: Setting | None) -> Part:
    """Return the measurement of training steps at a size, 2,048 tokens a step."""
    card = Setting(size, 1, 2048, 16, {PLAIN: 1, "mpo": 1, "eigen": 1}, rounds, 8192)
    options = None if tiny is None else {"setting": tiny}
    return Part(f"Training step and memory, {size}", "training", limit_s, {"setting": card}, options)


PARTS = {
    "rates": Part("The device", "gpu.rates", 60, {"square": 8192, "mib": 1024}, {"square": 64, "mib": 1}),
    "exactness": Part(
        *("Exactness", "gpu.exactness", 240, {"files": tuple(FILES)}),
        {"files": ("train/test_exactness.py",), "chosen": "identity_gauge or adamw-mpo"},
    ),
    "step-1b": step(SMALL, 300, 20, Setting("tiny", 1, 16, 4, {PLAIN: 1, "mpo": 1, "eigen": 1}, 2, 64)),
    "step-8b": step(LARGE, 300, 12, None),
    "launch": Part(
        *("Optimizer step", "step_overhead", 120),
        {"rounds": 40, "curve_layers": (10, 32, 80), "curve_rounds": 20},
        {"rounds": 2, "curve_layers": (1, 2), "curve_rounds": 2},
    ),
    "fold-8b": Part(
        *("Fold check", "gpu.fold_check", 240),
        {"size": LARGE, "dtypes": ("bf16", "fp32")},
        {"size": "tiny", "dtypes": ("bf16", "fp32")},
    ),
    "engines": Part(
        *("DeepSpeed and FSDP2", "gpu.engines", 240),
        {"size": SMALL, "length": 2048, "rate": 2e-3, "engines": ENGINES},
        {"size": "tiny", "length": 32, "rate": 1e-2, "engines": ENGINES},
    ),
    "vllm": Part("vLLM", "gpu.vllm", 480, {"target": "vllm-gpu"}, {"target": None}),
    "parity": Part(
        *("Parity on vLLM", "gpu.parity", 300),
        {"size": SMALL, "prompts": 100, "options": HALF},
        {"size": "tiny", "prompts": 10, "options": ("--enforce-eager", "--dtype", "float32")},
    ),
    "plug-in": Part(
        *("vLLM's plug-in", "gpu.plug_in", 300),
        {"size": SMALL, "options": (*HALF, "--max-model-len", "512", "--dtype", "bfloat16")},
        {"size": "tiny", "options": ()},
    ),
}
