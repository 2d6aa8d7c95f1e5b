"""What every report has: versions and the machine."""

from __future__ import annotations

from collections.abc import Sequence

import psutil

from loraover.common.provenance import environment, hardware, processor
from loraover_serve.engines.distributions import ONNX, ONNX_GENAI, installed_version

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
    return f"{processor()}, {memory:.0f} GiB of memory, {hardware()}"
