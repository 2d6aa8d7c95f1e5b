"""Arguments of an export for vLLM, checked before any file is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loraover.adapters.uniform.request_fields import given_adapter, replaces
from loraover.common.request import AnyName, AnyPath, Request, option
from loraover.models.request_fields import stored_dtype
from loraover.sources.push import keeps_private, pushes


@dataclass(frozen=True)
class VllmRequest(Request):
    """Write SOURCE as an adapter that vLLM, SGLang and PEFT read identically, and show how to serve it.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or a PEFT adapter of any kind; a kind that has an exact plain
    LoRA, such as LoHa or PiSSA, is converted first. A pre-flight then checks it against vLLM's loading rules: what vLLM
    refuses, and what it would serve wrongly without a message.

    Exit code 2: the pre-flight found an error, and nothing was written. Exit code 1: a written matrix failed its
    check, and nothing was written.
    """

    verb = "loraover export vllm"
    examples = (
        "loraover export vllm folded -o vllm-adapter",
        "loraover export vllm folded -o vllm-adapter --model ./Qwen3-0.6B --name support --vllm-version 0.33.0",
    )
    json_help = "Print pre-flight report, certificate and commands as JSON."

    source: AnyPath = given_adapter("LoRA-Over checkpoint, folded adapter or PEFT adapter of any kind")
    output: AnyPath = option("New folder for the adapter, its reports and a model card.", short="-o")
    model: AnyName | None = option(
        "Model to be served, folder or hub name.", default=None, default_text="the adapter's base model"
    )
    convert: bool = option(
        "Convert an adapter of another kind into the plain LoRA that expresses it, if an exact one exists.",
        default=True,
    )
    dtype: str = stored_dtype("bf16")
    name: str | None = option(
        "Name by which requests choose the adapter.", default=None, default_text="the output folder's name"
    )
    vllm_version: str | None = option(
        "Release of vLLM whose rules apply, such as 0.33.0.", default=None, default_text="0.32.0"
    )
    push_to_hub: str | None = pushes("the adapter")
    private: bool = keeps_private()
    force: bool = replaces("adapter for vLLM")

    def faults(self) -> Iterator[str]:
        name = self.adapter_name
        if not name.strip() or not name.isprintable():
            yield f"{self.named('name')}: {name!r} cannot be sent in a request; choose one of printable characters."

    @property
    def adapter_name(self) -> str:
        """Name by which requests choose the adapter."""
        return str(self.output.absolute().name) if self.name is None else self.name
