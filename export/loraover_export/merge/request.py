"""Arguments of a merge, checked before any file is read."""

from __future__ import annotations

from dataclasses import dataclass

from loraover.common.request import AnyName, AnyPath, Request, option
from loraover_export.uniform.request_fields import base_model, plain_adapter, replaces


@dataclass(frozen=True)
class MergeRequest(Request):
    """Arguments of `merge_adapter`."""

    verb = "loraover export merge"

    source: AnyPath = plain_adapter()
    output: AnyPath = option("New folder for the merged model, its certificate and a model card.", short="-o")
    model: AnyName | None = base_model()
    force: bool = replaces("merged model")
