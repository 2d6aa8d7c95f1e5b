"""The command `loraover export shrink`."""

from __future__ import annotations

from loraover.reporting.request_command import reporting, request_command
from loraover_export.combine.requests import ShrinkRequest

shrink = request_command(
    ShrinkRequest,
    reporting("loraover_export.combine.shrink:shrink_adapter", "loraover_export.uniform.show:show_lora"),
    json="Print the certificate as JSON.",
    examples=[
        "loraover export shrink folded -o smaller --rank 16",
        "loraover export shrink folded -o smaller --energy 0.99 --dtype bf16",
    ],
    help="""Write SOURCE with a smaller rank: the best approximation of each module, with its error.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. What a module loses is the part of its
    delta that its smallest singular values make up, and no adapter of that rank loses less.

    Exit code 1: a written matrix failed its check, and nothing was written.
    """,
)
