"""Arguments of a check, examined before any file is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loraover.common.errors import ConfigError
from loraover_export.check.engines import ENGINES


@dataclass(frozen=True)
class CheckRequest:
    """Arguments of `check_adapter`, where each is described.

    Raises:
        ConfigError: an engine that is not known.
    """

    adapter: Path
    engines: tuple[str, ...] = ()
    model: str | None = None

    def __post_init__(self) -> None:
        for engine in self.engines:
            if engine not in ENGINES:
                raise ConfigError(f"--engine: found {engine!r}, expected one of {', '.join(ENGINES)}.")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The engines to judge for, each once."""
        return tuple(dict.fromkeys(self.engines)) or tuple(ENGINES)
