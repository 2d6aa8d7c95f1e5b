"""What a measurement depends on besides the adapters: versions and the machine."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import psutil

from loraover.common.provenance import environment, hardware
from loraover_serve.engines.installed import installed_version

RUNTIMES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "onnxruntime-genai": ("onnxruntime-genai", "onnxruntime-genai-cuda"),
}
"""Distributions of what `onnx` runs on."""


def versions(engines: Sequence[str]) -> dict[str, str]:
    """Of this environment's packages; a vLLM server is of another and tells its own."""
    runtimes = {name: installed_version(names) for name, names in RUNTIMES.items() if "onnx" in engines}
    return environment("numpy", "scipy") | {name: version for name, version in runtimes.items() if version}


def machine() -> str:
    """Processor, memory, system and threads, in one line."""
    memory = psutil.virtual_memory().total / 2**30
    return f"{_processor()}, {memory:.0f} GiB of memory, {hardware()}"


def _processor() -> str:
    """The processor's name, which only Linux keeps in a file."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown processor")
