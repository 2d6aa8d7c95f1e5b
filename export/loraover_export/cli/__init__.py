"""The command `loraover-export`."""

from __future__ import annotations

import click

from loraover.common.command_line import LazyGroup, entry_point
from loraover.reporting.request_command import Reporting

PLACES = {
    "fold": ("fold.request:FoldRequest", "fold.run:fold_checkpoint", "fold.show:show_certificate"),
    "combine": ("combine.requests:CombineRequest", "combine.combine:combine_adapters", "uniform.show:show_lora"),
    "shrink": ("combine.requests:ShrinkRequest", "combine.shrink:shrink_adapter", "uniform.show:show_lora"),
    "merge": ("merge.request:MergeRequest", "merge.run:merge_adapter", "merge.show:show_merge"),
    "diff": ("combine.requests:DiffRequest", "combine.diff:diff_adapters", "combine.show:show_diff"),
    "vllm": ("vllm.request:VllmRequest", "vllm.run:export_vllm", "vllm.show:show_report"),
    "onnx": ("onnx.request:OnnxRequest", "onnx.run:export_onnx", "onnx.show:show_report"),
    "convert": ("convert.request:ConvertRequest", "convert.run:convert_adapter", "convert.show:show_report"),
    "gguf": ("gguf.request:GgufRequest", "gguf.run:export_gguf", "gguf.show:show_report"),
    "attest": ("attest.request:AttestRequest", "attest.run:attest_adapter", "attest.show:show_report"),
    "mlx": ("mlx.request:MlxRequest", "mlx.run:export_mlx", "mlx.show:show_report"),
}
"""Request, function, and function that prints the report, of each command."""
COMMANDS = {
    "check": "loraover_export.cli.fleet:check",
    "prepare": "loraover_export.cli.fleet:prepare",
    **{name: Reporting(*(f"loraover_export.{place}" for place in places)) for name, places in PLACES.items()},
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
