"""The command `loraover study`."""

from __future__ import annotations

from loraover.reporting.request_command import reporting, request_command
from loraover.study.request import StudyRequest

study = request_command(
    StudyRequest,
    reporting("loraover.study.runner:run_study", "loraover.study.show:show_study"),
    examples=[
        "loraover study gsm8k-smollm2 --lr-sweep 3e-4,1e-3,3e-3 --seeds 5 -o study",
        "loraover study demo --methods lora,lora-over --lr-sweep lora=1e-3,3e-3 --lr-sweep 3e-4,1e-3 -o study",
    ],
    help="""Train RECIPEs with several methods, learning rates and seeds, and compare the methods at their best rates.

    Finished runs are kept: the same command continues a study that was stopped.
    """,
)
