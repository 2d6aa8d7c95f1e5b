"""Conditions of a measurement besides the adapters: versions and the machine."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import psutil

from loraover.common.provenance import environment, hardware
from loraover_serve.engines.installed import ONNX, ONNX_GENAI, installed_version

RUNTIMES = {"onnxruntime": ONNX, "onnxruntime-genai": ONNX_GENAI}
"""Distributions of the packages that the engine onnx runs on."""


def versions(engines: Sequence[str]) -> dict[str, str]:
    """Versions of the packages in this environment; a vLLM server reports its version itself.

    Args:
        engines: names of the engines that were measured.
    """
    runtimes = {name: installed_version(names) for name, names in RUNTIMES.items() if "onnx" in engines}
    return environment("numpy", "scipy") | {name: version for name, version in runtimes.items() if version}


def machine() -> str:
    """Processor, memory, system and threads, in one line."""
    memory = psutil.virtual_memory().total / 2**30
    return f"{_processor()}, {memory:.0f} GiB of memory, {hardware()}"


def _processor() -> str:
    """Name of the processor, as Linux records it in a file; elsewhere as Python reports it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown processor")
