"""Arguments of an export for mlx-lm, checked before any file is read."""

from __future__ import annotations

from dataclasses import dataclass

from loraover.adapters.uniform.request_fields import base_model, plain_adapter, replaces
from loraover.common.request import AnyName, AnyPath, Request, option
from loraover.models.request_fields import stored_dtype


@dataclass(frozen=True)
class MlxRequest(Request):
    """Write SOURCE as an adapter for mlx-lm, and show how to run it.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. The scaling of every module is in the
    file, rsLoRA and patterns included. An adapter that mlx-lm would apply wrongly is refused.
    `loraover verify --engine mlx` compares mlx-lm's answers with PyTorch's.

    Exit code 1: a written matrix failed its check, and nothing was written.
    """

    verb = "loraover export mlx"
    examples = (
        "loraover export mlx folded -o mlx-adapter",
        "loraover export mlx runs/a/adapter -o mlx-adapter --dtype bf16",
    )

    source: AnyPath = plain_adapter()
    output: AnyPath = option("New folder for the adapter, its certificate and a model card.", short="-o")
    model: AnyName | None = base_model()
    dtype: str = stored_dtype()
    force: bool = replaces("adapter for mlx-lm")
