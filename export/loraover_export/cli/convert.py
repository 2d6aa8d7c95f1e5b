"""The command `loraover export convert`."""

from __future__ import annotations

from loraover.reporting.request_command import reporting, request_command
from loraover_export.convert.request import ConvertRequest

convert = request_command(
    ConvertRequest,
    reporting("loraover_export.convert.run:convert_adapter", "loraover_export.convert.show:show_report"),
    json="Print ranks and certificate as JSON.",
    examples=[
        "loraover export convert loha -o lora",
        "loraover export convert oft -o lora --rank 64 --check-error",
    ],
    help="""Write SOURCE, a PEFT adapter of one of 27 kinds, as a plain LoRA that engines read.

    The LoRA is exact if the kind has a finite rank: AdaLoRA, VeRA, VB-LoRA, HRA, MiSS, LoHa, LoKr, PiSSA, OLoRA and
    others. For kinds of full rank, such as OFT, DoRA and IA3, or to get a smaller rank, ask for an approximation with
    --rank. Kinds that change no weights are refused.

    Exit code 1: a matrix or, with --check-error, the logits of an exact LoRA failed their check, and nothing was
    written. Exit code 3: the LoRA was written, but it changes logits too little for --check-error to distinguish it
    from an adapter that does nothing.
    """,
)
