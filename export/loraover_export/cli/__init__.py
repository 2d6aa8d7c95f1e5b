"""The command `loraover-export`; each of its commands is a file here."""

from __future__ import annotations

import click

from loraover.common.command_line import LazyGroup, entry_point

COMMANDS = {
    "check": "loraover_export.cli.check:check",
    "fold": "loraover_export.cli.fold:fold",
    "combine": "loraover_export.cli.combine:combine",
    "shrink": "loraover_export.cli.shrink:shrink",
    "merge": "loraover_export.cli.merge:merge",
    "diff": "loraover_export.cli.diff:diff",
    "vllm": "loraover_export.cli.vllm:vllm",
    "onnx": "loraover_export.cli.onnx:onnx",
    "convert": "loraover_export.cli.convert:convert",
    "gguf": "loraover_export.cli.gguf:gguf",
    "mlx": "loraover_export.cli.mlx:mlx",
}
EXAMPLES = [
    "loraover export check my-lora",
    "loraover export fold runs/demo/adapter -o folded --check-error",
    "loraover export convert oft -o lora --rank 64 --check-error",
    "loraover export onnx folded -o onnx-merged --mode merged",
]


@click.group(cls=LazyGroup, commands_at=COMMANDS, examples=EXAMPLES)
@click.version_option(package_name="loraover")
def cli() -> None:
    """Fold LoRA-Over checkpoints into plain LoRA adapters, and export adapters for many engines."""


main = entry_point(cli)
