"""Arguments of a fold, checked before any file is read."""

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
)
from loraover.common.request import AnyName, AnyPath, Request, option
from loraover.models.device import choose_compute
from loraover.models.request_fields import max_memory, records, stored_dtype
from loraover.sources.push import keeps_private, pushes


@dataclass(frozen=True)
class FoldRequest(Request):
    """Contract CHECKPOINT's cores into a plain PEFT adapter and certify every matrix.

    CHECKPOINT is the adapter folder of a LoRA-Over run, or a checkpoint-N of a Hugging Face Trainer. Its cores are the
    small tensors that training kept in place of each LoRA matrix; multiplied out, they give the matrix again.

    Exit code 1: a check failed, and nothing was written. Exit code 3: the adapter was written, but it changes logits
    too little for --check-error to distinguish it from an adapter that does nothing.
    """

    verb = "loraover export fold"
    examples = (
        "loraover export fold runs/demo/lora-over/adapter -o folded",
        "loraover export fold output/checkpoint-500 -o folded --dtype bf16 --check-error",
        "loraover export fold output/checkpoint-500 -o folded --check-error --device cuda --compute-dtype bf16",
    )

    checkpoint: AnyPath = given_adapter("LoRA-Over checkpoint, or checkpoint-N of a Hugging Face Trainer")
    output: AnyPath = option("New folder for the adapter, its certificate, its report and a model card.", short="-o")
    dtype: str = stored_dtype()
    check_error: bool = option(
        "Also compare the adapter's logits with those of the model that still computes with cores.", default=False
    )
    trained_on: str | None = option(
        "How bitsandbytes quantised the base model in training: also measure how far logits differ between that base "
        "and the full one.",
        default=None,
        choices=("nf4", "int8"),
        needs="check_error",
    )
    record: bool = records("the folded adapter")
    push_to_hub: str | None = pushes("the folded adapter")
    private: bool = keeps_private()
    model: AnyName | None = base_model(" for the comparison of logits, and for the reference")
    prompts: AnyPath | None = prompts()
    device: str = logits_device()
    compute_dtype: str = logits_dtype()
    max_memory_gib: float | None = max_memory()
    force: bool = replaces("folded adapter")

    def faults(self) -> Iterator[str]:
        if self.record and not self.check_error:  # a reference takes all of the check's arguments but its prompts
            choose_compute(self.device, self.compute_dtype)
            yield from check_faults(self, "check_error", "prompts")
        else:
            names = ("model", "prompts", "max_memory_gib", "device", "compute_dtype")
            yield from check_faults(self, "check_error", *names)
