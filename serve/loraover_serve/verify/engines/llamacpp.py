"""llama.cpp in this process, on a GGUF adapter that is exported for the comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, final

from loraover.common.errors import ExportError, OutputError
from loraover.models.load import load_model
from loraover_export.gguf.llamacpp import LlamaCpp
from loraover_serve.engines.distributions import LLAMA_CPP, installed_version
from loraover_serve.verify.answers import ADAPTER, BASE
from loraover_serve.verify.engines.base import LogitEngine, Setting, VerifyEngine


@final
class LlamaCppEngine(LogitEngine):
    """One GGUF model, without the adapter and with it.

    Args:
        running: the loaded model of each arm.
    """

    def __init__(self, running: Mapping[str, LlamaCpp]) -> None:
        self._running = running
        self.version = installed_version(LLAMA_CPP)

    @classmethod
    def install(cls, vllm: str) -> str | None:
        lacking = installed_version(LLAMA_CPP) is None or installed_version(["gguf"]) is None
        return "pip install 'loraover[llamacpp]'" if lacking else None

    @classmethod
    @contextmanager
    def start(cls, setting: Setting) -> Iterator[VerifyEngine]:
        from loraover_export.gguf.run import export_gguf

        output = setting.scratch / f"{ADAPTER}.gguf"
        exported = export_gguf(setting.adapter, output, model=setting.base.location)
        if exported.verdict == "failed":
            raise ExportError("llamacpp: a matrix of the GGUF adapter is not within its error bound.")
        base = setting.request.base_gguf or _write_base(setting)
        with ExitStack() as stack:
            paths = {BASE: None, ADAPTER: output}
            yield cls({arm: stack.enter_context(LlamaCpp(base, path)) for arm, path in paths.items()})

    def logits(self, arm: str, tokens: Sequence[int]) -> Any:
        return self._running[arm].logits(tokens)

    def greedy(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        return [self._running[arm].greedy(prompt, tokens) for prompt in prompts]


def _write_base(setting: Setting) -> Path:
    """Write the base model as GGUF in F32, and return its path."""
    from loraover_export.gguf.base import write_base

    setting.request.report.line(f"writing {setting.base.name} as GGUF in F32")
    try:
        return write_base(load_model(setting.base), setting.scratch / "base.gguf")
    except OSError as error:
        raise OutputError(
            f"cannot write the base model to {setting.scratch}: {error.strerror or error}; name a GGUF file of it with "
            f"{setting.request.named('base_gguf')}, or another temporary folder with TMPDIR."
        ) from error
