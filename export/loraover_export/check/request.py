"""Arguments of a check, examined before any file is read."""

from __future__ import annotations

from dataclasses import dataclass

from loraover.common.request import AnyName, AnyNames, AnyPath, Request, argument, option
from loraover_export.check.engines import ENGINES
from loraover_export.uniform.request_fields import base_model


@dataclass(frozen=True)
class CheckRequest(Request):
    """Arguments of `check_adapter`."""

    verb = "loraover export check"

    adapter: AnyPath = argument("Folder of a LoRA-Over checkpoint, or of a PEFT adapter of any method.")
    engines: AnyNames = option(
        "Engine to judge for.", default=(), default_text="all", flag="--engine", choices=tuple(ENGINES)
    )
    model: AnyName | None = base_model()

    @property
    def chosen(self) -> tuple[str, ...]:
        """The engines to judge for, each once."""
        return tuple(dict.fromkeys(self.engines)) or tuple(ENGINES)
