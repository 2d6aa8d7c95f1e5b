"""The arguments of a recording, checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loraover.checkpoint.files import REFERENCE_FILE
from loraover.common.request import AnyName, AnyPath, Request, argument, option
from loraover.models.device import choose_compute
from loraover.models.request_fields import compute_dtype, device, max_memory


@dataclass(frozen=True)
class RecordRequest(Request):
    """Record how an adapter answers, so that any server can be checked without PyTorch and the base model.

    ADAPTER is a LoRA-Over checkpoint or any plain PEFT LoRA of a causal language model. PyTorch runs the base model,
    the adapter, and each known fault of serving on the same questions. `loraover verify --reference` and the
    file of `--checker` compare a server's answers with what is recorded.

    Published questions find mistakes, not fraud: a server that knows them could answer only these as trained. For an
    audit, --sealed writes a second reference with other questions, which you keep to yourself. Its SHA-256 is in the
    published reference, which shows at the audit that the file was not changed.
    """

    verb = "loraover record"
    extra = "serve"
    examples = (
        "loraover record folded",
        "loraover record runs/a/adapter --device cuda -o shop.json.gz --checker adapter_check.pyz",
        "loraover record folded --device cuda --compute-dtype bf16",
        "loraover record folded --sealed ../sealed.json.gz --sealed-prompts secret.txt",
    )

    adapter: AnyPath = argument("Folder of a LoRA-Over checkpoint or a PEFT LoRA.")
    model: AnyName | None = option(
        "Base model, folder or hub name.", default=None, default_text="the base model that the adapter names"
    )
    prompts: AnyPath | None = option(
        "UTF-8 text file, one question a line; the first 64 tokens of each are used.",
        default=None,
        default_text="as many of 64 built-in questions as a verdict on a server in bfloat16 needs",
    )
    new_tokens: int = option(
        "Length of PyTorch's greedy answers, in tokens; servers are compared at each of these tokens.",
        default=4,
        least=1,
    )
    device: str = device("Device that PyTorch runs on, such as cpu or cuda:1.")
    compute_dtype: str = compute_dtype(
        "Data type in which PyTorch computes; what bf16 and fp16 add to the noise is measured and allowed for."
    )
    max_memory_gib: float | None = max_memory()
    sealed: AnyPath | None = option(
        "File for a second reference with other questions, of which only the SHA-256 is published.",
        default=None,
        needs="sealed_prompts",
    )
    sealed_prompts: AnyPath | None = option(
        "UTF-8 text file with the questions of the sealed reference, one a line. Show it to nobody.",
        default=None,
        needs="sealed",
    )
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
        choose_compute(self.device, self.compute_dtype)

    def faults(self) -> Iterator[str]:
        for name, path in self.files.items():
            if path.exists() and not self.force:
                yield f"{path} exists; choose another {self.named(name)}, or give {self.named('force')}."
        if len({path.resolve() for path in self.files.values()}) < len(self.files):
            yield f"{' and '.join(map(self.named, self.files))} name one file; choose one for each."
        if self.sealed is not None:
            folders = self.adapter.resolve(), self.destination.resolve().parent
            if self.sealed_prompts == self.prompts:
                yield f"{self.named('sealed_prompts')} has the published questions; a sealed reference needs others."
            if any(self.sealed.resolve().is_relative_to(folder) for folder in folders):
                yield f"{self.named('sealed', self.sealed)} would be published with the adapter; choose another folder."

    @property
    def files(self) -> dict[str, AnyPath]:
        """The files to write, by the options that name them."""
        found = {"output": self.destination, "sealed": self.sealed, "checker": self.checker}
        return {name: path for name, path in found.items() if path is not None}

    @property
    def destination(self) -> AnyPath:
        """The file to write."""
        return self.adapter / REFERENCE_FILE if self.output is None else self.output
