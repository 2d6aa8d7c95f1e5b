"""Arguments of an export for mlx-lm, checked before any file is read."""

from __future__ import annotations

from dataclasses import dataclass

from loraover.common.request import AnyName, AnyPath, Request, option
from loraover.models.request_fields import stored_dtype
from loraover_export.uniform.request_fields import base_model, plain_adapter, replaces


@dataclass(frozen=True)
class MlxRequest(Request):
    """Arguments of `export_mlx`."""

    verb = "loraover export mlx"

    source: AnyPath = plain_adapter()
    output: AnyPath = option("New folder for the adapter, its certificate and a model card.", short="-o")
    model: AnyName | None = base_model()
    dtype: str = stored_dtype()
    force: bool = replaces("adapter for mlx-lm")
