"""Serve adapters with vLLM, verify that engines answer as they were trained, and measure how fast they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraover.common.later import names_on_first_use

if TYPE_CHECKING:  # each name as itself, by which type checkers know that it is public
    from loraover.common.errors import UnwrittenReportError as UnwrittenReportError
    from loraover_serve.engines.base import Sample as Sample
    from loraover_serve.judge.estimates import Interval as Interval
    from loraover_serve.judge.results import GreedyAgreement as GreedyAgreement
    from loraover_serve.judge.results import LogprobDistance as LogprobDistance
    from loraover_serve.judge.results import Suspect as Suspect
    from loraover_serve.judge.vectors.reading import VectorFindings as VectorFindings
    from loraover_serve.parity.answers import Answer as Answer
    from loraover_serve.parity.answers import Distance as Distance
    from loraover_serve.parity.answers import Outputs as Outputs
    from loraover_serve.parity.report import ParityReport as ParityReport
    from loraover_serve.parity.run import measure_parity as measure_parity
    from loraover_serve.parity.samples import Measurement as Measurement
    from loraover_serve.parity.servers import CrossCheck as CrossCheck
    from loraover_serve.parity.servers import PeakMemory as PeakMemory
    from loraover_serve.parity.statistics import Latency as Latency
    from loraover_serve.parity.statistics import Result as Result
    from loraover_serve.parity.statistics import Throughput as Throughput
    from loraover_serve.rollouts.loop import RolloutJudge as RolloutJudge
    from loraover_serve.rollouts.report import JudgedStep as JudgedStep
    from loraover_serve.rollouts.report import RolloutReport as RolloutReport
    from loraover_serve.rollouts.run import judge_rollout_file as judge_rollout_file
    from loraover_serve.rollouts.trl import VerifyRollouts as VerifyRollouts
    from loraover_serve.rollouts.verdict import Finding as Finding
    from loraover_serve.rollouts.verdict import judge_rollouts as judge_rollouts
    from loraover_serve.rollouts.verdict import scale_faults as scale_faults
    from loraover_serve.verify.recorder import RecordReport as RecordReport
    from loraover_serve.verify.recorder import record_adapter as record_adapter
    from loraover_serve.verify.report import EngineResult as EngineResult
    from loraover_serve.verify.report import VerifyReport as VerifyReport
    from loraover_serve.verify.run import verify_adapter as verify_adapter
    from loraover_serve.vllm.client import Completion as Completion
    from loraover_serve.vllm.client import Streamed as Streamed
    from loraover_serve.vllm.client import VllmServer as VllmServer
    from loraover_serve.vllm.serve import serve_adapters as serve_adapters
    from loraover_serve.watch.history import Check as Check
    from loraover_serve.watch.run import WatchReport as WatchReport
    from loraover_serve.watch.run import watch_adapters as watch_adapters

__getattr__, __all__ = names_on_first_use(__name__, __file__)
