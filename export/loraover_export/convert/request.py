"""Arguments of a conversion, checked before any file is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loraover.common.request import AnyName, AnyPath, Request, argument, option
from loraover.models.request_fields import stored_dtype
from loraover_export.uniform.request_fields import (
    base_model,
    check_faults,
    logits_device,
    logits_dtype,
    prompts,
    replaces,
)


@dataclass(frozen=True)
class ConvertRequest(Request):
    """Arguments of `convert_adapter`."""

    verb = "loraover export convert"

    source: AnyPath = argument("Folder of a PEFT adapter of any kind.")
    output: AnyPath = option("New folder for the LoRA, its certificate and a model card.", short="-o")
    rank: int | None = option(
        "Largest rank of the LoRA; what does not fit into it is lost, and the loss is shown.",
        default=None,
        default_text="the exact one",
        least=1,
    )
    model: AnyName | None = base_model()
    dtype: str = stored_dtype(product="LoRA")
    check_error: bool = option(
        "Also compare the LoRA's logits with the source's; an exact LoRA has to keep them but for rounding.",
        default=False,
    )
    prompts: AnyPath | None = prompts()
    device: str = logits_device()
    compute_dtype: str = logits_dtype()
    force: bool = replaces("certified LoRA")

    def faults(self) -> Iterator[str]:
        yield from check_faults(self, "check_error", "prompts", "device", "compute_dtype")
