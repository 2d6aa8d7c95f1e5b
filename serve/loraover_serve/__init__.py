"""Serve adapters with vLLM, verify that engines answer as they were trained, and measure how fast they are."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # each name as itself, by which type checkers know that it is public
    from loraover.client.tokens import Completion as Completion
    from loraover.client.tokens import Streamed as Streamed
    from loraover.common.errors import UnwrittenReportError as UnwrittenReportError
    from loraover_serve.engines.sample import Sample as Sample
    from loraover_serve.judge.estimates import Interval as Interval
    from loraover_serve.judge.results import GreedyAgreement as GreedyAgreement
    from loraover_serve.judge.results import LogprobDistance as LogprobDistance
    from loraover_serve.judge.results import Suspect as Suspect
    from loraover_serve.parity.judge.analysis import Latency as Latency
    from loraover_serve.parity.judge.analysis import Result as Result
    from loraover_serve.parity.judge.analysis import Throughput as Throughput
    from loraover_serve.parity.judge.outputs import Answer as Answer
    from loraover_serve.parity.judge.outputs import Distance as Distance
    from loraover_serve.parity.judge.outputs import Outputs as Outputs
    from loraover_serve.parity.measure.cross_check import CrossCheck as CrossCheck
    from loraover_serve.parity.measure.memory import PeakMemory as PeakMemory
    from loraover_serve.parity.report.parity_report import ParityReport as ParityReport
    from loraover_serve.parity.run import measure_parity as measure_parity
    from loraover_serve.parity.samples import Measurement as Measurement
    from loraover_serve.record.check import verify_adapter as verify_adapter
    from loraover_serve.record.recorder import RecordReport as RecordReport
    from loraover_serve.record.recorder import record_adapter as record_adapter
    from loraover_serve.verify.report import EngineResult as EngineResult
    from loraover_serve.verify.report import VerifyReport as VerifyReport
    from loraover_serve.vllm.serve import serve_adapters as serve_adapters
    from loraover_serve.vllm.server import VllmServer as VllmServer
    from loraover_serve.watch.history import Check as Check
    from loraover_serve.watch.run import WatchReport as WatchReport
    from loraover_serve.watch.run import watch_adapters as watch_adapters

_HOMES = {
    "Answer": "loraover_serve.parity.judge.outputs",
    "Check": "loraover_serve.watch.history",
    "Completion": "loraover.client.tokens",
    "CrossCheck": "loraover_serve.parity.measure.cross_check",
    "Distance": "loraover_serve.parity.judge.outputs",
    "EngineResult": "loraover_serve.verify.report",
    "GreedyAgreement": "loraover_serve.judge.results",
    "Interval": "loraover_serve.judge.estimates",
    "Latency": "loraover_serve.parity.judge.analysis",
    "LogprobDistance": "loraover_serve.judge.results",
    "Measurement": "loraover_serve.parity.samples",
    "Outputs": "loraover_serve.parity.judge.outputs",
    "ParityReport": "loraover_serve.parity.report.parity_report",
    "PeakMemory": "loraover_serve.parity.measure.memory",
    "RecordReport": "loraover_serve.record.recorder",
    "Result": "loraover_serve.parity.judge.analysis",
    "Sample": "loraover_serve.engines.sample",
    "Streamed": "loraover.client.tokens",
    "Suspect": "loraover_serve.judge.results",
    "Throughput": "loraover_serve.parity.judge.analysis",
    "UnwrittenReportError": "loraover.common.errors",
    "VerifyReport": "loraover_serve.verify.report",
    "VllmServer": "loraover_serve.vllm.server",
    "WatchReport": "loraover_serve.watch.run",
    "measure_parity": "loraover_serve.parity.run",
    "record_adapter": "loraover_serve.record.recorder",
    "serve_adapters": "loraover_serve.vllm.serve",
    "verify_adapter": "loraover_serve.record.check",
    "watch_adapters": "loraover_serve.watch.run",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import on first use, so that commands start fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'loraover_serve' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
