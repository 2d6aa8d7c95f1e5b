"""Arguments of an export for vLLM, checked before any file is read."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from loraover.common.errors import ConfigError


@dataclass(frozen=True)
class VllmRequest:
    """Arguments of `export_vllm`, where each is described.

    Raises:
        ConfigError: a name that no request could carry.
    """

    source: Path
    output: Path
    model: str | None = None
    dtype: str = "bf16"
    name: str | None = None
    vllm_version: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        name = self.adapter_name
        if not name.strip() or not name.isprintable():
            raise ConfigError(f"--name: {name!r} cannot be sent in a request; choose one of printable characters.")

    @property
    def adapter_name(self) -> str:
        """Name by which requests choose the adapter."""
        return self.output.absolute().name if self.name is None else self.name

    def command(self) -> str:
        """Return the command line for the model card, without --force, which depends on what was at the output."""
        words = ["loraover", "export", "vllm", str(self.source), "-o", str(self.output), "--dtype", self.dtype]
        words += [] if self.model is None else ["--model", self.model]
        words += [] if self.vllm_version is None else ["--vllm-version", self.vllm_version]
        return shlex.join([*words, *([] if self.name is None else ["--name", self.name])])
