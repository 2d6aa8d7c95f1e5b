"""The command `loraover export mlx`."""

from __future__ import annotations

from loraover.reporting.request_command import reporting, request_command
from loraover_export.mlx.request import MlxRequest

mlx = request_command(
    MlxRequest,
    reporting("loraover_export.mlx.run:export_mlx", "loraover_export.mlx.show:show_report"),
    json="Print the certificate as JSON.",
    examples=[
        "loraover export mlx folded -o mlx-adapter",
        "loraover export mlx runs/a/adapter -o mlx-adapter --dtype bf16",
    ],
    help="""Write SOURCE as an adapter for mlx-lm, and show how to run it.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. The scaling of every module is in the
    file, rsLoRA and patterns included. An adapter that mlx-lm would apply wrongly is refused.
    `loraover serve verify --engine mlx` compares mlx-lm's answers with PyTorch's.

    Exit code 1: a written matrix failed its check, and nothing was written.
    """,
)
