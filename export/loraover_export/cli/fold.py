"""The command `loraover export fold`."""

from __future__ import annotations

from loraover.reporting.request_command import reporting, request_command
from loraover_export.fold.request import FoldRequest

fold = request_command(
    FoldRequest,
    reporting("loraover_export.fold.run:fold_checkpoint", "loraover_export.fold.show:show_certificate"),
    json="Print the certificate as JSON.",
    examples=[
        "loraover export fold runs/demo/lora-over/adapter -o folded",
        "loraover export fold output/checkpoint-500 -o folded --dtype bf16 --check-error",
        "loraover export fold output/checkpoint-500 -o folded --check-error --device cuda --compute-dtype bf16",
    ],
    help="""Contract CHECKPOINT's cores into a plain PEFT adapter and certify every matrix.

    CHECKPOINT is the adapter folder of a LoRA-Over run, or a checkpoint-N of a Hugging Face Trainer. Its cores are the
    small tensors that training kept in place of each LoRA matrix; multiplied out, they give the matrix again.

    Exit code 1: a check failed, and nothing was written. Exit code 3: the adapter was written, but it changes logits
    too little for --check-error to distinguish it from an adapter that does nothing.
    """,
)
