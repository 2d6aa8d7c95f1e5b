"""Arguments of a merge, checked before any file is read."""

from __future__ import annotations

from dataclasses import dataclass

from loraover.adapters.uniform.request_fields import base_model, plain_adapter, replaces
from loraover.common.request import AnyName, AnyPath, Request, option

CERTIFICATE_FILE = "merge_certificate.json"


@dataclass(frozen=True)
class MergeRequest(Request):
    """Write the base model with SOURCE merged into its weights, and say how much of the adapter rounding erased.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. Each sum is computed in float64 and
    rounded once to the data type of the base model's weight. The memory is that of the largest tensor.

    Exit code 1: a written weight failed its check, and nothing was written.
    """

    verb = "loraover export merge"
    examples = (
        "loraover export merge folded -o merged",
        "loraover export merge folded -o merged --model ./Qwen3-0.6B",
    )

    source: AnyPath = plain_adapter()
    output: AnyPath = option("New folder for the merged model, its certificate and a model card.", short="-o")
    model: AnyName | None = base_model()
    force: bool = replaces("merged model")
