"""The measurements of `make gpu`, in their order, and the same ones so small that a CPU takes them in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.exactness import FILES
from benchmarks.settings import PLAIN, Setting

TURNS = {PLAIN: 1, "mpo": 1, "eigen": 1}
GPU_SERVER = ("--gpu-memory-utilization", "0.5", "--max-model-len", "512", "--dtype", "bfloat16")


@dataclass(frozen=True)
class Part:
    """One measurement, in a process of its own.

    Args:
        title: Its heading on the page.
        module: Module of `benchmarks` that has it as the function `measure`.
        limit_s: Seconds after which it is ended.
        options: Arguments of `measure`.
    """

    title: str
    module: str
    limit_s: float
    options: Mapping[str, Any] = field(default_factory=dict)


def step(size: str, limit_s: float, rounds: int) -> Part:
    """Return the measurement of training steps at a size, 2,048 tokens a step."""
    setting = Setting(size, 1, 2048, 16, TURNS, rounds, 8192)
    return Part(f"Training step and memory, {size}", "training", limit_s, {"setting": setting})


PLANS: dict[str, dict[str, Part]] = {
    "card": {
        "rates": Part("The card", "gpu.rates", 60, {"square": 8192, "mib": 1024}),
        "exactness": Part("Exactness", "gpu.exactness", 240, {"files": tuple(FILES)}),
        "step-1b": step("Llama-3.2-1B", 150, rounds=20),
        "step-8b": step("Llama-3.1-8B", 300, rounds=12),
        "launch": Part(
            "Optimizer step", "step_overhead", 120, {"rounds": 40, "curve_layers": (10, 32, 80), "curve_rounds": 20}
        ),
        "fold-8b": Part("Fold check", "gpu.fold_check", 240, {"size": "Llama-3.1-8B", "dtypes": ("bf16", "fp32")}),
        "engines": Part(
            "DeepSpeed and FSDP2",
            "gpu.engines",
            240,
            {"size": "Llama-3.2-1B", "length": 2048, "engines": ("ddp", "zero2", "zero3", "fsdp2")},
        ),
        "vllm": Part("vLLM", "gpu.vllm", 480, {"target": "vllm-gpu"}),
        "parity": Part(
            "Parity on vLLM", "gpu.parity", 300, {"size": "Llama-3.2-1B", "prompts": 100, "options": GPU_SERVER[:2]}
        ),
        "plug-in": Part("vLLM's plug-in", "gpu.plug_in", 240, {"size": "Llama-3.2-1B", "options": GPU_SERVER}),
    },
    "tiny": {
        "rates": Part("The processor", "gpu.rates", 60, {"square": 64, "mib": 1}),
        "exactness": Part(
            "Exactness",
            "gpu.exactness",
            120,
            {"files": ("train/test_exactness.py",), "chosen": "identity_gauge or adamw-mpo"},
        ),
        "step": Part(
            "Training step and memory",
            "training",
            300,
            {"setting": Setting("tiny", 1, 16, 4, TURNS, 2, 64)},
        ),
        "launch": Part(
            "Optimizer step", "step_overhead", 120, {"rounds": 2, "curve_layers": (1, 2), "curve_rounds": 2}
        ),
        "fold": Part("Fold check", "gpu.fold_check", 120, {"size": "tiny", "dtypes": ("bf16", "fp32")}),
        "engines": Part(
            "DeepSpeed and FSDP2",
            "gpu.engines",
            240,
            {"size": "tiny", "length": 32, "engines": ("ddp", "zero2", "zero3", "fsdp2")},
        ),
        "vllm": Part("vLLM", "gpu.vllm", 60, {"target": None}),
        "parity": Part(
            "Parity on vLLM",
            "gpu.parity",
            400,
            {"size": "tiny", "prompts": 10, "options": ("--enforce-eager", "--dtype", "float32")},
        ),
        "plug-in": Part("vLLM's plug-in", "gpu.plug_in", 400, {"size": "tiny", "options": ()}),
    },
}
"""Measurements of each plan: "card" for a GPU with 80 GB, "tiny" for a CPU."""
