"""What every report has: versions and the machine, and an error for one that cannot be written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psutil

from loraover.common.errors import OutputError
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


class UnwrittenReportError(OutputError):
    """A finished measurement or verification whose output could not be written.

    Args:
        message: reason why the output could not be written.
        report: the `ParityReport` or `VerifyReport`. The folder `report.kept` holds it as a file, with engines' logs;
            None means that it could not be written there either.
    """

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report
