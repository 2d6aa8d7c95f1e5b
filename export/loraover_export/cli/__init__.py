"""The command `loraover-export`."""

from __future__ import annotations

import click

from loraover.common.command_line import LazyGroup, entry_point
from loraover.reporting.request_command import Reporting

PLACES = {
    "fold": ("requests:FoldRequest", "fold.run:fold_checkpoint", "fold.report:show_certificate"),
    "combine": (
        "loraover.adapters.combine.requests:CombineRequest",
        "loraover.adapters.combine.combine:combine_adapters",
        "loraover.adapters.show:show_lora",
    ),
    "shrink": (
        "loraover.adapters.combine.requests:ShrinkRequest",
        "loraover.adapters.combine.combine:shrink_adapter",
        "loraover.adapters.show:show_lora",
    ),
    "merge": ("requests:MergeRequest", "merge.run:merge_adapter", "merge.show:show_merge"),
    "diff": (
        "loraover.adapters.combine.requests:DiffRequest",
        "loraover.adapters.combine.diff:diff_adapters",
        "loraover.adapters.show:show_diff",
    ),
    "vllm": ("requests:VllmRequest", "formats.vllm.run:export_vllm", "formats.vllm.show:show_report"),
    "onnx": ("requests:OnnxRequest", "formats.onnx.run:export_onnx", "formats.onnx.show:show_report"),
    "convert": (
        "loraover.adapters.convert.request:ConvertRequest",
        "loraover.adapters.convert.run:convert_adapter",
        "loraover.adapters.show:show_report",
    ),
    "gguf": ("requests:GgufRequest", "formats.gguf.run:export_gguf", "formats.gguf.show:show_report"),
    "attest": ("attest.request:AttestRequest", "attest.run:attest_adapter", "attest.report:show_report"),
    "mlx": ("requests:MlxRequest", "formats.mlx:export_mlx", "formats.mlx:show_report"),
}
"""Request, function, and function that prints the report, of each command."""


def _whole(place: str) -> str:
    return place if place.startswith("loraover.") else f"loraover_export.{place}"


COMMANDS = {
    "check": "loraover_export.cli.fleet:check",
    "prepare": "loraover_export.cli.fleet:prepare",
    **{name: Reporting(*map(_whole, places)) for name, places in PLACES.items()},
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
