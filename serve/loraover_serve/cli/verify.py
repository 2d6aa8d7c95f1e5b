"""The command `loraover serve verify`."""

from __future__ import annotations

from loraover.reporting.request_command import reporting, request_command
from loraover_serve.verify.request import VerifyRequest

verify = request_command(
    VerifyRequest,
    reporting("loraover_serve.verify.run:verify_adapter", "loraover_serve.verify.show:show_report"),
    examples=[
        "loraover serve verify folded --engine onnx --engine torch -o verified",
        "loraover serve verify runs/a/adapter --engine vllm -- --dtype float32",
        "loraover serve verify folded --engine llamacpp --base-gguf SmolLM2-135M-Instruct-Q8_0.gguf",
        "loraover serve verify shop --endpoint http://localhost:8000 --served-name shop",
    ],
    help="""Verify that engines answer as an adapter was trained, and name the likely fault if one does not.

    ADAPTER is a LoRA-Over checkpoint or any plain PEFT LoRA of a causal language model. An engine gets it in the form
    that it needs, and answers the same prompts as PyTorch. Its distance from PyTorch on the base model is its noise.

    Words after -- are passed to `vllm serve`, except options that this command sets itself.

    Exit code 0: as trained; 1: an engine differs; 3: inconclusive, since the adapter moves the answers less than the
    noise; 2: unusable request, or an engine that failed.
    """,
)
