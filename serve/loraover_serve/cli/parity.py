"""The command `loraover serve parity`."""

from __future__ import annotations

from loraover.reporting.request_command import reporting, request_command
from loraover_serve.parity.request import ParityRequest

parity = request_command(
    ParityRequest,
    reporting(
        "loraover_serve.parity.run:measure_parity",
        "loraover_serve.parity.report.show:show_report",
        leaves_out=["runs"],
    ),
    json="Print the report as JSON, without the samples.",
    examples=[
        "loraover serve parity --adapter folded --checkpoint runs/a/adapter -o parity",
        "loraover serve parity --adapter shop --also-adapter news --engine vllm --max-concurrency 4 --num-prompts 200",
        "loraover serve parity --adapter for-vllm --engine vllm --max-concurrency 1,4 --num-prompts 200 -o parity",
    ],
    help="""Measure whether a folded adapter is as fast as a plain LoRA, and gives the answers it should.

    An equivalence test compares their times with a margin; a second copy of the plain LoRA shows the machine's noise.
    Answers are compared with PyTorch's.

    Words after -- are passed to `vllm serve`, except options that this command sets itself, such as the prefix cache.

    Exit code 0: equivalent; 1: different; 3: inconclusive; 2: unusable request, or an engine that failed.
    """,
)
