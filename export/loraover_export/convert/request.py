"""Arguments of a conversion, checked before any file is read."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from loraover.common.errors import ConfigError
from loraover.models.device import choose_compute


@dataclass(frozen=True)
class ConvertRequest:
    """Arguments of `convert_adapter`, where each is described.

    Raises:
        ConfigError: a rank below 1, an option of the check without `check_error`, or a device that is not there.
    """

    source: Path
    output: Path
    rank: int | None = None
    model: str | None = None
    dtype: str = "fp32"
    check_error: bool = False
    prompts: Path | None = None
    device: str = "auto"
    compute_dtype: str = "fp32"
    force: bool = False

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"--rank is {self.rank}; expected at least 1.")
        if (self.prompts, self.device, self.compute_dtype) != (None, "auto", "fp32") and not self.check_error:
            raise ConfigError(
                "--prompts, --device and --compute-dtype are for --check-error, which runs the model; add it."
            )
        if self.check_error:
            choose_compute(self.device, self.compute_dtype)

    def command(self) -> str:
        """Return the command line for the model card, without --force, which depends on what was at the output."""
        words = ["loraover", "export", "convert", str(self.source), "-o", str(self.output), "--dtype", self.dtype]
        words += [] if self.rank is None else ["--rank", str(self.rank)]
        words += [] if self.model is None else ["--model", self.model]
        words += ["--check-error"] if self.check_error else []
        words += [] if self.prompts is None else ["--prompts", str(self.prompts)]
        if self.check_error:
            words += ["--device", self.device, "--compute-dtype", self.compute_dtype]
        return shlex.join(words)
