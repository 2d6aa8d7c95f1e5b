"""Serve adapters with vLLM, and measure whether a folded adapter is as fast as a plain LoRA."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraover_serve.engines.sample import Sample
    from loraover_serve.parity.judge.analysis import Latency, Result, Throughput
    from loraover_serve.parity.judge.outputs import Answer, Distance, Outputs
    from loraover_serve.parity.measure.cross_check import CrossCheck
    from loraover_serve.parity.measure.memory import PeakMemory
    from loraover_serve.parity.report.parity_report import ParityReport, UnwrittenReportError
    from loraover_serve.parity.run import measure_parity
    from loraover_serve.parity.samples import Measurement
    from loraover_serve.vllm.client import Completion, Streamed
    from loraover_serve.vllm.serve import serve_adapters
    from loraover_serve.vllm.server import VllmServer

_HOMES = {
    "Answer": "parity.judge.outputs",
    "Completion": "vllm.client",
    "CrossCheck": "parity.measure.cross_check",
    "Distance": "parity.judge.outputs",
    "Latency": "parity.judge.analysis",
    "Measurement": "parity.samples",
    "Outputs": "parity.judge.outputs",
    "ParityReport": "parity.report.parity_report",
    "PeakMemory": "parity.measure.memory",
    "Result": "parity.judge.analysis",
    "Sample": "engines.sample",
    "Streamed": "vllm.client",
    "Throughput": "parity.judge.analysis",
    "UnwrittenReportError": "parity.report.parity_report",
    "VllmServer": "vllm.server",
    "measure_parity": "parity.run",
    "serve_adapters": "vllm.serve",
}

__all__ = [
    "Answer",
    "Completion",
    "CrossCheck",
    "Distance",
    "Latency",
    "Measurement",
    "Outputs",
    "ParityReport",
    "PeakMemory",
    "Result",
    "Sample",
    "Streamed",
    "Throughput",
    "UnwrittenReportError",
    "VllmServer",
    "measure_parity",
    "serve_adapters",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that commands start fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'loraover_serve' has no attribute {name!r}")
    return getattr(import_module(f"loraover_serve.{_HOMES[name]}"), name)
