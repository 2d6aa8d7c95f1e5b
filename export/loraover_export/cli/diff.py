"""The command `loraover export diff`."""

from __future__ import annotations

from loraover.reporting.request_command import reporting, request_command
from loraover_export.combine.requests import DiffRequest

diff = request_command(
    DiffRequest,
    reporting("loraover_export.combine.diff:diff_adapters", "loraover_export.combine.show:show_diff"),
    json="Print the comparison as JSON, with every module and angle.",
    examples=[
        "loraover export diff run-1 run-2",
        "loraover export diff folded smaller --logits --prompts prompts.txt",
    ],
    help="""Compare the adapters FIRST and SECOND module by module: norms, differences and principal angles.

    Both are LoRA-Over checkpoints, folded adapters or plain PEFT LoRAs of one base model. A and B are not unique, so
    their products are compared, and never formed.
    """,
)
