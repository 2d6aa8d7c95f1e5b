"""The decompositions that can stand behind a LoRA matrix; a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraover.common.errors import ConfigError
from loraover.overparam.decompositions.base import Decomposition
from loraover.overparam.decompositions.chain import Chain
from loraover.overparam.decompositions.mpo import Mpo
from loraover.overparam.decompositions.svd import Svd

DECOMPOSITIONS: dict[str, type[Decomposition]] = {"mpo": Mpo, "svd": Svd, "chain": Chain}


def make_decomposition(name: str, options: Mapping[str, Any] | None = None) -> Decomposition:
    """The decomposition of that name with these options.

    Raises:
        ConfigError: an unknown name, an unknown option or an option out of range.
    """
    if name not in DECOMPOSITIONS:
        raise ConfigError(f"decomposition is {name!r}, expected one of {', '.join(DECOMPOSITIONS)}.")
    try:
        return DECOMPOSITIONS[name](**(options or {}))
    except TypeError as error:
        raise ConfigError(f"decomposition {name!r}: {error}") from error


__all__ = ["DECOMPOSITIONS", "Chain", "Decomposition", "Mpo", "Svd", "make_decomposition"]
