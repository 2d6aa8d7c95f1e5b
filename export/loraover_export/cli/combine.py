"""The command `loraover export combine`."""

from __future__ import annotations

from loraover.reporting.request_command import reporting, request_command
from loraover_export.combine.requests import CombineRequest

combine = request_command(
    CombineRequest,
    reporting("loraover_export.combine.combine:combine_adapters", "loraover_export.uniform.show:show_lora"),
    json="Print the certificate as JSON.",
    examples=[
        "loraover export combine maths code -o both",
        "loraover export combine maths code -o both --weights 0.7,0.3 --dtype bf16",
    ],
    help="""Write the weighted sum of SOURCES as one plain LoRA adapter, exactly.

    SOURCES are LoRA-Over checkpoints, folded adapters or plain PEFT LoRAs of one base model. The ranks are
    concatenated; where the adapters share directions, the sum has a smaller rank and is written with it.

    Exit code 1: a written matrix failed its check, and nothing was written.
    """,
)
