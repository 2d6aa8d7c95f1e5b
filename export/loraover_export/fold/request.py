"""Arguments of a fold, checked before any file is read."""

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
class FoldRequest(Request):
    """Arguments of `fold_checkpoint`."""

    verb = "loraover export fold"

    checkpoint: AnyPath = argument("Folder of a LoRA-Over checkpoint, or checkpoint-N of a Hugging Face Trainer.")
    output: AnyPath = option("New folder for the adapter, its certificate, its report and a model card.", short="-o")
    dtype: str = stored_dtype()
    check_error: bool = option(
        "Also compare the adapter's logits with those of the model that still computes with cores.", default=False
    )
    model: AnyName | None = base_model(" for the comparison of logits")
    prompts: AnyPath | None = prompts()
    device: str = logits_device()
    compute_dtype: str = logits_dtype()
    force: bool = replaces("folded adapter")

    def faults(self) -> Iterator[str]:
        yield from check_faults(self, "check_error", "model", "prompts", "device", "compute_dtype")
