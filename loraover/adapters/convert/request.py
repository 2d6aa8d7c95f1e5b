"""Arguments of a conversion, checked before any file is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loraover.adapters.uniform.request_fields import (
    base_model,
    check_faults,
    given_adapter,
    logits_device,
    logits_dtype,
    prompts,
    replaces,
    stored_dtype,
)
from loraover.common.request import AnyName, AnyPath, Request, option


@dataclass(frozen=True)
class ConvertRequest(Request):
    """Write SOURCE, a PEFT adapter of one of 27 kinds, as a plain LoRA that engines read.

    The LoRA is exact if the kind has a finite rank: AdaLoRA, VeRA, VB-LoRA, HRA, MiSS, LoHa, LoKr, PiSSA, OLoRA and
    others. For kinds of full rank, such as OFT, DoRA and IA3, or to get a smaller rank, ask for an approximation with
    --approximate-to-rank. Kinds that change no weights are refused.

    Exit code 1: a matrix or, with --check-error, the logits of an exact LoRA failed their check, and nothing was
    written. Exit code 3: the LoRA was written, but it changes logits too little for --check-error to distinguish it
    from an adapter that does nothing.
    """

    verb = "loraover export convert"
    examples = (
        "loraover export convert loha -o lora",
        "loraover export convert oft -o lora --approximate-to-rank 64 --check-error",
    )
    json_help = "Print ranks and certificate as JSON."

    source: AnyPath = given_adapter("PEFT adapter of any kind")
    output: AnyPath = option("New folder for the LoRA, its certificate and a model card.", short="-o")
    approximate_to_rank: int | None = option(
        "Largest rank of the LoRA; what does not fit into it is lost, and the loss is shown.",
        default=None,
        default_text="the exact one",
        former=("--rank",),
        least=1,
    )
    model: AnyName | None = base_model()
    dtype: str = stored_dtype(product="LoRA")
    check_error: bool = option(
        "Also compare the LoRA's logits with the source's; an exact LoRA may change them by rounding only.",
        default=False,
    )
    prompts: AnyPath | None = prompts()
    device: str = logits_device()
    compute_dtype: str = logits_dtype()
    force: bool = replaces("certified LoRA")

    def faults(self) -> Iterator[str]:
        yield from check_faults(self, "check_error", "prompts", "device", "compute_dtype")
