"""Serve adapters with vLLM, verify that engines answer as they were trained, and measure how fast they are."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraover_serve.comparison.report import UnwrittenReportError
    from loraover_serve.engines.sample import Sample
    from loraover_serve.parity.judge.analysis import Latency, Result, Throughput
    from loraover_serve.parity.judge.outputs import Answer, Distance, Outputs
    from loraover_serve.parity.measure.cross_check import CrossCheck
    from loraover_serve.parity.measure.memory import PeakMemory
    from loraover_serve.parity.report.parity_report import ParityReport
    from loraover_serve.parity.run import measure_parity
    from loraover_serve.parity.samples import Measurement
    from loraover_serve.verify.report import EngineResult, Greedy, LogprobDistance, Suspect, VerifyReport
    from loraover_serve.verify.run import verify_adapter
    from loraover_serve.vllm.client import Completion, Streamed
    from loraover_serve.vllm.serve import serve_adapters
    from loraover_serve.vllm.server import VllmServer

_HOMES = {
    "Answer": "parity.judge.outputs",
    "Completion": "vllm.client",
    "CrossCheck": "parity.measure.cross_check",
    "Distance": "parity.judge.outputs",
    "EngineResult": "verify.report",
    "Greedy": "verify.report",
    "Latency": "parity.judge.analysis",
    "LogprobDistance": "verify.report",
    "Measurement": "parity.samples",
    "Outputs": "parity.judge.outputs",
    "ParityReport": "parity.report.parity_report",
    "PeakMemory": "parity.measure.memory",
    "Result": "parity.judge.analysis",
    "Sample": "engines.sample",
    "Streamed": "vllm.client",
    "Suspect": "verify.report",
    "Throughput": "parity.judge.analysis",
    "UnwrittenReportError": "comparison.report",
    "VerifyReport": "verify.report",
    "VllmServer": "vllm.server",
    "measure_parity": "parity.run",
    "serve_adapters": "vllm.serve",
    "verify_adapter": "verify.run",
}

__all__ = [
    "Answer",
    "Completion",
    "CrossCheck",
    "Distance",
    "EngineResult",
    "Greedy",
    "Latency",
    "LogprobDistance",
    "Measurement",
    "Outputs",
    "ParityReport",
    "PeakMemory",
    "Result",
    "Sample",
    "Streamed",
    "Suspect",
    "Throughput",
    "UnwrittenReportError",
    "VerifyReport",
    "VllmServer",
    "measure_parity",
    "serve_adapters",
    "verify_adapter",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that commands start fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'loraover_serve' has no attribute {name!r}")
    return getattr(import_module(f"loraover_serve.{_HOMES[name]}"), name)
