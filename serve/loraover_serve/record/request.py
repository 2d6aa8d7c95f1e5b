"""The arguments of a recording, checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loraover.common.request import AnyName, AnyPath, Request, argument, option
from loraover.models.device import choose_device
from loraover.models.request_fields import device

REFERENCE_FILE = "adapter_reference.json.gz"


@dataclass(frozen=True)
class RecordRequest(Request):
    """Record how an adapter answers, so that any server can be checked without PyTorch and the base model.

    ADAPTER is a LoRA-Over checkpoint or any plain PEFT LoRA of a causal language model. PyTorch runs the base model,
    the adapter, and each known fault of serving on the same questions. `loraover serve verify --reference` and the
    file of `--checker` compare a server's answers with what is recorded.

    Published questions find mistakes. A server that knows them could answer them alone as it should.
    """

    verb = "loraover serve record"
    examples = (
        "loraover serve record folded",
        "loraover serve record runs/a/adapter --device cuda -o shop.json.gz --checker adapter_check.pyz",
    )

    adapter: AnyPath = argument("Folder of a LoRA-Over checkpoint or a PEFT LoRA.")
    model: AnyName | None = option(
        "Base model, folder or hub name.", default=None, default_text="the base model that the adapter names"
    )
    prompts: AnyPath | None = option(
        "UTF-8 text file, one question a line; the first 64 tokens of each are used.",
        default=None,
        default_text="as many of 64 built-in questions as decide on a server in bfloat16",
    )
    new_tokens: int = option(
        "Length of PyTorch's greedy answers, in tokens; servers are compared at each of these tokens.",
        default=4,
        least=1,
    )
    device: str = device("Device that PyTorch runs on, such as cpu or cuda:1.")
    output: AnyPath | None = option(
        "File for the reference.", default=None, default_text=f"{REFERENCE_FILE} in the adapter's folder", short="-o"
    )
    checker: AnyPath | None = option(
        "File for the checker alone, a program of the standard library that `python FILE REFERENCE URL` runs.",
        default=None,
    )
    force: bool = option("Replace a file that exists.", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        choose_device(self.device)

    def faults(self) -> Iterator[str]:
        if self.destination.exists() and not self.force:
            yield f"{self.destination} exists; choose another {self.named('output')}, or give {self.named('force')}."

    @property
    def destination(self) -> AnyPath:
        """The file to write."""
        return self.adapter / REFERENCE_FILE if self.output is None else self.output
