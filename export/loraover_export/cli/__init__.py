"""The command `loraover-export`."""

from __future__ import annotations

import click

from loraover.common.command_line import LazyGroup, entry_point
from loraover.reporting.request_command import Reporting

COMMANDS = {
    "check": "loraover_export.cli.fleet:check",
    "prepare": "loraover_export.cli.fleet:prepare",
    "fold": Reporting(
        "loraover_export.requests:FoldRequest",
        "loraover_export.fold.run:fold_checkpoint",
        "loraover_export.fold.report:show_certificate",
    ),
    "combine": Reporting(
        "loraover.adapters.combine.requests:CombineRequest",
        "loraover.adapters.combine.combine:combine_adapters",
        "loraover.adapters.show:show_lora",
    ),
    "shrink": Reporting(
        "loraover.adapters.combine.requests:ShrinkRequest",
        "loraover.adapters.combine.combine:shrink_adapter",
        "loraover.adapters.show:show_lora",
    ),
    "merge": Reporting(
        "loraover_export.requests:MergeRequest",
        "loraover_export.merge.run:merge_adapter",
        "loraover_export.merge.report:show_merge",
    ),
    "inspect-merge": Reporting(
        "loraover_export.requests:InspectMergeRequest",
        "loraover_export.merged.run:inspect_merge",
        "loraover_export.merged.report:show_report",
    ),
    "diff": Reporting(
        "loraover.adapters.combine.requests:DiffRequest",
        "loraover.adapters.combine.diff:diff_adapters",
        "loraover.adapters.show:show_diff",
    ),
    "vllm": Reporting(
        "loraover_export.requests:VllmRequest",
        "loraover_export.formats.vllm.run:export_vllm",
        "loraover_export.formats.vllm.run:show_report",
    ),
    "onnx": Reporting(
        "loraover_export.requests:OnnxRequest",
        "loraover_export.formats.onnx.run:export_onnx",
        "loraover_export.formats.onnx.report:show_report",
    ),
    "convert": Reporting(
        "loraover.adapters.convert.request:ConvertRequest",
        "loraover.adapters.convert.run:convert_adapter",
        "loraover.adapters.show:show_report",
    ),
    "gguf": Reporting(
        "loraover_export.requests:GgufRequest",
        "loraover_export.formats.gguf.run:export_gguf",
        "loraover_export.formats.gguf.run:show_report",
    ),
    "attest": Reporting(
        "loraover_export.requests:AttestRequest",
        "loraover_export.attest:attest_adapter",
        "loraover_export.attest:show_report",
    ),
    "mlx": Reporting(
        "loraover_export.requests:MlxRequest",
        "loraover_export.formats.mlx:export_mlx",
        "loraover_export.formats.mlx:show_report",
    ),
}
EXAMPLES = [
    "loraover export fold runs/demo/adapter -o folded --check-error",
    "loraover export convert oft -o lora --approximate-to-rank 64 --check-error",
    "loraover export onnx folded -o onnx-merged --mode merged",
]


@click.group(cls=LazyGroup, commands_at=COMMANDS, tree="loraover.cli:cli", examples=EXAMPLES)
@click.version_option(package_name="loraover")
def cli() -> None:
    """Fold LoRA-Over checkpoints into plain LoRA adapters, and export adapters for many engines."""


main = entry_point(cli)
