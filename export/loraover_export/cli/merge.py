"""The command `loraover export merge`."""

from __future__ import annotations

from loraover.reporting.request_command import reporting, request_command
from loraover_export.merge.request import MergeRequest

merge = request_command(
    MergeRequest,
    reporting("loraover_export.merge.run:merge_adapter", "loraover_export.merge.show:show_merge"),
    examples=[
        "loraover export merge folded -o merged",
        "loraover export merge folded -o merged --model ./Qwen3-0.6B",
    ],
    help="""Write the base model with SOURCE merged into its weights, and say how much of the adapter rounding erased.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. Each sum is computed in float64 and
    rounded once to the data type of the base model's weight. The memory is that of the largest tensor.

    Exit code 1: a written weight failed its check, and nothing was written.
    """,
)
