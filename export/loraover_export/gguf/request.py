"""Arguments of an export for llama.cpp, and the check of its output's place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loraover.common.atomic_output import check_file_writable, check_free
from loraover.common.errors import ConfigError, EngineError, OutputError
from loraover.common.paths import kind_of
from loraover_export.gguf.header import read_header


@dataclass(frozen=True)
class GgufRequest:
    """Arguments of `export_gguf`, where each is described.

    Raises:
        ConfigError: a number of threads below 1, or one without `base_gguf`; or an output without a name that can be
            printed.
    """

    source: Path
    output: Path
    model: str | None = None
    dtype: str = "fp32"
    base_gguf: Path | None = None
    threads: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.threads is not None and self.base_gguf is None:
            raise ConfigError("--threads is for the run in llama.cpp; use it with --base-gguf.")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"--threads is {self.threads}, expected 1 or more.")
        if not self.output.name.isprintable() or not self.output.stem.strip():
            raise ConfigError(f"--output: {self.output.name!r} cannot name the adapter; choose printable characters.")

    def check_output(self) -> None:
        """Check that a new file can be written, or replace a GGUF adapter if `force` is true.

        Raises:
            ConfigError: the path is too long, or a folder on it may not be entered.
            OutputError: the file cannot be written, or another one is there.
        """
        target = self.output.absolute()
        found = kind_of(target)
        if found == "folder":
            raise OutputError(f"{target} is a folder; name a file in it, such as {target / 'adapter.gguf'}.")
        if self.force and found == "file" and not target.is_symlink():
            if not _is_adapter(target):
                raise OutputError(
                    f"{target} holds no GGUF adapter, and --force replaces GGUF adapters only; choose another output."
                )
        else:
            check_free(target, outside=self.source)
        check_file_writable(target, parents=True)


def _is_adapter(path: Path) -> bool:
    try:
        return read_header(path).is_adapter
    except EngineError:
        return False
