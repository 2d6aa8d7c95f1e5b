"""Arguments of a fold, checked before any file is read."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from loraover.common.errors import ConfigError


@dataclass(frozen=True)
class FoldRequest:
    """Arguments of `fold_checkpoint`, where each is described.

    Raises:
        ConfigError: `model` or `prompts` without `check_error`.
    """

    checkpoint: Path
    output: Path
    dtype: str = "fp32"
    check_error: bool = False
    model: str | None = None
    prompts: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if (self.model is not None or self.prompts is not None) and not self.check_error:
            raise ConfigError("--model and --prompts are for --check-error, which runs the model; add it.")

    def command(self) -> str:
        """Return the command line for the model card, without --force, which depends on what was at the output."""
        words = ["loraover-export", "fold", str(self.checkpoint), "-o", str(self.output), "--dtype", self.dtype]
        words += ["--check-error"] if self.check_error else []
        words += [] if self.model is None else ["--model", self.model]
        return shlex.join([*words, *([] if self.prompts is None else ["--prompts", str(self.prompts)])])
