"""The command `loraover export vllm`."""

from __future__ import annotations

from loraover.reporting.request_command import reporting, request_command
from loraover_export.vllm.request import VllmRequest

vllm = request_command(
    VllmRequest,
    reporting("loraover_export.vllm.run:export_vllm", "loraover_export.vllm.show:show_report"),
    json="Print pre-flight report, certificate and commands as JSON.",
    examples=[
        "loraover export vllm folded -o vllm-adapter",
        "loraover export vllm folded -o vllm-adapter --model ./Qwen3-0.6B --name support --vllm-version 0.33.0",
    ],
    help="""Write SOURCE as an adapter that vLLM, SGLang and PEFT read identically, and show how to serve it.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. A pre-flight first checks it against
    vLLM's loading rules: what vLLM refuses, and what it would serve wrongly without a message.

    Exit code 2: the pre-flight found an error, and nothing was written. Exit code 1: a written matrix failed its
    check, and nothing was written.
    """,
)
