"""Fold LoRA-Over checkpoints into plain LoRAs, certify them, and export them for the engines that people use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraover.common.later import names_on_first_use

if TYPE_CHECKING:  # each name as itself, by which type checkers know that it is public
    from loraover.adapters.combine.combine import combine_adapters as combine_adapters
    from loraover.adapters.combine.combine import shrink_adapter as shrink_adapter
    from loraover.adapters.combine.diff import DiffReport as DiffReport
    from loraover.adapters.combine.diff import diff_adapters as diff_adapters
    from loraover.adapters.convert.run import ConvertReport as ConvertReport
    from loraover.adapters.convert.run import convert_adapter as convert_adapter
    from loraover.adapters.uniform.certificate import LoraCertificate as LoraCertificate
    from loraover_export.attest import AttestReport as AttestReport
    from loraover_export.attest import attest_adapter as attest_adapter
    from loraover_export.check.report import CheckReport as CheckReport
    from loraover_export.check.run import check_adapter as check_adapter
    from loraover_export.fold.report import FoldCertificate as FoldCertificate
    from loraover_export.fold.run import fold_checkpoint as fold_checkpoint
    from loraover_export.formats.gguf.run import GgufReport as GgufReport
    from loraover_export.formats.gguf.run import export_gguf as export_gguf
    from loraover_export.formats.mlx import MlxReport as MlxReport
    from loraover_export.formats.mlx import export_mlx as export_mlx
    from loraover_export.formats.onnx.report import OnnxReport as OnnxReport
    from loraover_export.formats.onnx.run import export_onnx as export_onnx
    from loraover_export.formats.vllm.rules import Preflight as Preflight
    from loraover_export.formats.vllm.run import VllmCertificate as VllmCertificate
    from loraover_export.formats.vllm.run import VllmReport as VllmReport
    from loraover_export.formats.vllm.run import export_vllm as export_vllm
    from loraover_export.merge.report import MergeReport as MergeReport
    from loraover_export.merge.run import merge_adapter as merge_adapter
    from loraover_export.merged.report import InspectMergeReport as InspectMergeReport
    from loraover_export.merged.run import inspect_merge as inspect_merge
    from loraover_export.prepare.cache import PreparedAdapter as PreparedAdapter
    from loraover_export.prepare.fleet import check_fleet as check_fleet
    from loraover_export.prepare.fleet import prepare_fleet as prepare_fleet
    from loraover_export.prepare.report import FleetReport as FleetReport
    from loraover_export.prepare.run import prepare_adapter as prepare_adapter

__getattr__, __all__ = names_on_first_use(__name__, __file__)
