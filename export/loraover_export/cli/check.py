"""The command `loraover export check`."""

from __future__ import annotations

from loraover.reporting.request_command import reporting, request_command
from loraover_export.check.request import CheckRequest

check = request_command(
    CheckRequest,
    reporting("loraover_export.check.run:check_adapter", "loraover_export.check.show:show_report"),
    examples=[
        "loraover export check runs/a/adapter",
        "loraover export check my-lora --engine vllm --engine llamacpp --model ./Qwen3-0.6B",
    ],
    help="""Say for each engine whether it would refuse ADAPTER or apply it wrongly without a message, and what
    repairs that.

    ADAPTER is a LoRA-Over checkpoint or a PEFT adapter of any method. No engine is run or needs to be installed. Each
    engine is judged on the adapter as it is, in PEFT's form, and on what the export for that engine writes.

    Exit code 1: an engine refuses the adapter as it is, or applies it wrongly. `--engine` chooses the engines that
    matter to you: mlx-lm, for instance, has a format of its own and refuses every adapter as it is.
    """,
)
