"""Arguments of a check, examined before any file is read."""

from __future__ import annotations

from dataclasses import dataclass

from loraover.adapters.uniform.request_fields import base_model, given_adapter
from loraover.common.request import AnyName, AnyNames, AnyPath, Request, option
from loraover_export.check.engines import ENGINES


@dataclass(frozen=True)
class CheckRequest(Request):
    """Say for each engine whether it would refuse ADAPTER or silently apply it wrongly, and what repairs that.

    ADAPTER is a LoRA-Over checkpoint or a PEFT adapter of any method. No engine is run or needs to be installed. Each
    engine is judged on what our export for it writes, after a conversion where the adapter is of another kind, and on
    the adapter as it is, in PEFT's form.

    Exit code 1: one of the engines that `--engine` names takes the adapter in neither form. Without `--engine`, no
    engine takes it.
    """

    verb = "loraover check"
    examples = (
        "loraover check runs/a/adapter",
        "loraover check my-lora --engine vllm --engine llamacpp --model ./Qwen3-0.6B",
    )

    adapter: AnyPath = given_adapter("LoRA-Over checkpoint, or PEFT adapter of any method")
    engines: AnyNames = option(
        "Engine to judge for.", default=(), default_text="all", flag="--engine", choices=tuple(ENGINES)
    )
    model: AnyName | None = base_model()

    @property
    def chosen(self) -> tuple[str, ...]:
        """The engines to check for, each once."""
        return tuple(dict.fromkeys(self.engines)) or tuple(ENGINES)
