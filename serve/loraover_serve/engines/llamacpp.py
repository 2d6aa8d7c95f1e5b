"""llama.cpp in this process, on a GGUF adapter that is exported for the comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, final

from loraover.common.errors import ExportError, OutputError
from loraover.common.extras import install
from loraover.models.load import load_model
from loraover_export.formats.gguf.llamacpp import LlamaCppModel, check_pair
from loraover_serve.engines.base import LogitEngine, Setting
from loraover_serve.judge.limits import ADAPTER, BASE


@final
class LlamaCppEngine(LogitEngine):
    """GGUF model, without the adapter and with it.

    Args:
        running: The loaded model of each arm.
    """

    name = "llamacpp"
    distributions = ("llama-cpp-py-sync",)
    needs = ("gguf",)
    hint = install("llamacpp")

    def __init__(self, running: Mapping[str, LlamaCppModel]) -> None:
        self._running = running

    @classmethod
    def check(cls, setting: Setting) -> None:
        if setting.base_gguf is not None:
            check_pair(setting.base_gguf, None)

    @classmethod
    @contextmanager
    def start(cls, setting: Setting) -> Iterator[LlamaCppEngine]:
        from loraover_export.formats.gguf.base import write_base
        from loraover_export.formats.gguf.run import export_gguf

        output = setting.scratch / f"{ADAPTER}.gguf"
        exported = export_gguf(setting.adapter, output, model=setting.base.location)
        if exported.verdict == "failed":
            raise ExportError("llamacpp: a matrix of the GGUF adapter is not within its error bound.")
        base = setting.base_gguf
        if base is None:
            setting.request.report.line(f"writing {setting.base.name} as GGUF in F32")
            try:
                in_memory = replace(setting.base, is_streamed=False)  # as its tensors are written from there
                base = write_base(load_model(in_memory), setting.scratch / "base.gguf")
            except OSError as error:
                raise OutputError(
                    f"cannot write the base model to {setting.scratch}: {error.strerror or error}; name a GGUF file of "
                    f"it with {setting.request.named('base_gguf')}, or another temporary folder with TMPDIR."
                ) from error
        with ExitStack() as stack:
            paths = {BASE: None, ADAPTER: output}
            yield cls({arm: stack.enter_context(LlamaCppModel(base, path)) for arm, path in paths.items()})

    def logits(self, arm: str, sequences: Iterable[Sequence[int]]) -> Iterator[Any]:
        return map(self._running[arm].logits, sequences)

    def generate(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        return [self._running[arm].greedy(prompt, tokens) for prompt in prompts]
