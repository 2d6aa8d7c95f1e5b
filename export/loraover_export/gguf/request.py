"""Arguments of an export for llama.cpp, and the check of its output's place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loraover.adapters.uniform.request_fields import base_model, plain_adapter, replaces
from loraover.common.atomic_output import check_file_writable, check_free
from loraover.common.errors import EngineError, OutputError
from loraover.common.paths import kind_of
from loraover.common.request import AnyName, AnyPath, Request, option
from loraover.models.request_fields import stored_dtype
from loraover_export.gguf.header import read_header


@dataclass(frozen=True)
class GgufRequest(Request):
    """Write SOURCE as a GGUF adapter for llama.cpp, and run it there on your GGUF file of the base model.

    SOURCE is a LoRA-Over checkpoint, a folded adapter or any plain PEFT LoRA. The scaling of every module is in the
    file, rsLoRA and patterns included, and the rows of queries and keys are in llama.cpp's order. An adapter that
    llama.cpp would apply wrongly or only in part is refused.

    Exit code 1: a matrix or llama.cpp's logits failed their check, and nothing was written. Exit code 3: the adapter
    was written, but it changes logits too little for the check to distinguish it from one that does nothing.
    """

    verb = "loraover export gguf"
    extra = "llamacpp"
    examples = (
        "loraover export gguf folded -o adapter.gguf",
        "loraover export gguf runs/a/adapter -o adapter.gguf --base-gguf SmolLM2-135M-Instruct-F32.gguf",
    )

    source: AnyPath = plain_adapter()
    output: AnyPath = option("New file for the adapter, such as adapter.gguf.", short="-o")
    model: AnyName | None = base_model()
    dtype: str = stored_dtype()
    base_gguf: AnyPath | None = option(
        "GGUF file of the base model, on which llama.cpp runs the adapter for a comparison with PyTorch.", default=None
    )
    threads: int | None = option(
        "Number of threads for llama.cpp on that file.", default=None, default_text="one for each core", least=1
    )
    force: bool = replaces("GGUF adapter")

    def faults(self) -> Iterator[str]:
        if self.threads is not None and self.base_gguf is None:
            yield f"{self.named('threads')} is for the run in llama.cpp; use it with {self.named('base_gguf')}."
        if not self.output.name.isprintable() or not self.output.stem.strip():
            yield (
                f"{self.named('output')}: {self.output.name!r} cannot name the adapter; choose printable characters."
            )

    def check_output(self) -> None:
        """Check that a new file can be written, or replace a GGUF adapter if `force` is true.

        Raises:
            ConfigError: The path is too long, or a folder on it may not be entered.
            OutputError: The file cannot be written, or another one is there.
        """
        target = self.output.absolute()
        found = kind_of(target)
        if found == "folder":
            raise OutputError(f"{target} is a folder; name a file in it, such as {target / 'adapter.gguf'}.")
        if self.force and found == "file" and not target.is_symlink():
            if not _is_adapter(target):
                raise OutputError(
                    f"{target} holds no GGUF adapter, and {self.named('force')} replaces GGUF adapters only; choose "
                    "another output."
                )
        else:
            check_free(target, outside=self.source)
        check_file_writable(target, parents=True)


def _is_adapter(path: Path) -> bool:
    try:
        return read_header(path).is_adapter
    except EngineError:
        return False
