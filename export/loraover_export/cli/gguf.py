"""The command `loraover export gguf`."""

from __future__ import annotations

from loraover.reporting.request_command import reporting, request_command
from loraover_export.gguf.request import GgufRequest

gguf = request_command(
    GgufRequest,
    reporting("loraover_export.gguf.run:export_gguf", "loraover_export.gguf.show:show_report"),
    examples=[
        "loraover export gguf folded -o adapter.gguf",
        "loraover export gguf runs/a/adapter -o adapter.gguf --base-gguf SmolLM2-135M-Instruct-F32.gguf",
    ],
    help="""Write SOURCE as a GGUF adapter for llama.cpp, and run it there on your GGUF file of the base model.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. The scaling of every module is in the
    file, rsLoRA and patterns included, and the rows of queries and keys are in llama.cpp's order. An adapter that
    llama.cpp would apply wrongly or only in part is refused.

    Exit code 1: a matrix or llama.cpp's logits failed their check, and nothing was written. Exit code 3: the adapter
    was written, but it changes logits too little for the check to distinguish it from one that does nothing.
    """,
)
