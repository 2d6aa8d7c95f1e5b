"""Fold LoRA-Over checkpoints into plain LoRAs, certify them, and export them for the engines that people use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # each name as itself, by which type checkers know that it is public
    from loraover_export.attest.run import AttestReport as AttestReport
    from loraover_export.attest.run import attest_adapter as attest_adapter
    from loraover_export.check.report import CheckReport as CheckReport
    from loraover_export.check.run import check_adapter as check_adapter
    from loraover_export.combine.combine import combine_adapters as combine_adapters
    from loraover_export.combine.diff import diff_adapters as diff_adapters
    from loraover_export.combine.diff_report import DiffReport as DiffReport
    from loraover_export.combine.shrink import shrink_adapter as shrink_adapter
    from loraover_export.convert.report import ConvertReport as ConvertReport
    from loraover_export.convert.run import convert_adapter as convert_adapter
    from loraover_export.fleet.row import FleetReport as FleetReport
    from loraover_export.fleet.run import check_fleet as check_fleet
    from loraover_export.fleet.run import prepare_fleet as prepare_fleet
    from loraover_export.fold.certificate import FoldCertificate as FoldCertificate
    from loraover_export.fold.run import fold_checkpoint as fold_checkpoint
    from loraover_export.gguf.report import GgufReport as GgufReport
    from loraover_export.gguf.run import export_gguf as export_gguf
    from loraover_export.merge.report import MergeReport as MergeReport
    from loraover_export.merge.run import merge_adapter as merge_adapter
    from loraover_export.mlx.report import MlxReport as MlxReport
    from loraover_export.mlx.run import export_mlx as export_mlx
    from loraover_export.onnx.report import OnnxReport as OnnxReport
    from loraover_export.onnx.run import export_onnx as export_onnx
    from loraover_export.prepare.prepared import PreparedAdapter as PreparedAdapter
    from loraover_export.prepare.run import prepare_adapter as prepare_adapter
    from loraover_export.uniform.certificate import LoraCertificate as LoraCertificate
    from loraover_export.vllm.preflight import Preflight as Preflight
    from loraover_export.vllm.report import VllmCertificate as VllmCertificate
    from loraover_export.vllm.report import VllmReport as VllmReport
    from loraover_export.vllm.run import export_vllm as export_vllm


_HOMES = {
    "AttestReport": "attest.run",
    "CheckReport": "check.report",
    "ConvertReport": "convert.report",
    "DiffReport": "combine.diff_report",
    "FleetReport": "fleet.row",
    "FoldCertificate": "fold.certificate",
    "GgufReport": "gguf.report",
    "LoraCertificate": "uniform.certificate",
    "MergeReport": "merge.report",
    "MlxReport": "mlx.report",
    "OnnxReport": "onnx.report",
    "Preflight": "vllm.preflight",
    "PreparedAdapter": "prepare.prepared",
    "VllmCertificate": "vllm.report",
    "VllmReport": "vllm.report",
    "attest_adapter": "attest.run",
    "check_adapter": "check.run",
    "check_fleet": "fleet.run",
    "combine_adapters": "combine.combine",
    "convert_adapter": "convert.run",
    "diff_adapters": "combine.diff",
    "export_gguf": "gguf.run",
    "export_mlx": "mlx.run",
    "export_onnx": "onnx.run",
    "export_vllm": "vllm.run",
    "fold_checkpoint": "fold.run",
    "merge_adapter": "merge.run",
    "prepare_adapter": "prepare.run",
    "prepare_fleet": "fleet.run",
    "shrink_adapter": "combine.shrink",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import on first use, so that commands start fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'loraover_export' has no attribute {name!r}")
    return getattr(import_module(f"loraover_export.{_HOMES[name]}"), name)
