"""Settings of the plug-in, from environment variables, and the folder that an adapter's name leads to."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

ADAPTERS, CACHE = "LORAOVER_ADAPTERS", "LORAOVER_CACHE"
APPROXIMATE, PREPARE = "LORAOVER_APPROXIMATE", "LORAOVER_PREPARE"
HUB_ALLOW, PYTHON, THREADS = "LORAOVER_HUB_ALLOW", "LORAOVER_PYTHON", "LORAOVER_THREADS"
RELOAD, SETTLE = "LORAOVER_RELOAD", "LORAOVER_SETTLE"

PLUGIN = "loraover"
"""Name of the plug-in in VLLM_PLUGINS, without which vLLM loads no routes of plug-ins."""

DEFAULT_CACHE = "~/.cache/loraover/adapters"
DEFAULT_THREADS = 2
DEFAULT_SETTLE_S = 3.0
MOST_SETTLE_S = 3600.0


class RefusedError(Exception):
    """A name or an adapter that is not served, with a reason that clients may read."""


@dataclass(frozen=True)
class Settings:
    """Settings from the server's environment.

    Args:
        adapters: Folder whose sub-folders are the adapters, by name.
        cache: Folder of prepared adapters, which several servers may share.
        python: Python of the environment that prepares adapters.
        threads: Number of adapters that are prepared at once.
        approximate: Rank to approximate adapters to that have no exact LoRA of the server's rank; None refuses them.
        prepare: Names of adapters to prepare when the server starts.
        hub: Patterns of hub names that may be served, such as "org/*"; none by default.
        reload: Whether a served adapter whose folder changes is served anew.
        settle_s: Seconds for which an adapter's files have to be unchanged before they are read.
    """

    adapters: Path
    cache: Path
    python: str
    threads: int
    approximate: int | None
    prepare: tuple[str, ...]
    hub: tuple[str, ...]
    reload: bool
    settle_s: float

    def is_on_hub(self, name: str) -> bool:
        """Whether a name is one of the hub that may be served, with or without a revision after "@"."""
        return name.count("/") == 1 and any(fnmatchcase(name.partition("@")[0], pattern) for pattern in self.hub)

    def source_of(self, place: str) -> dict[str, str]:
        """Return the keyword for the load route's `lora_path`: `source` with a folder, or `hub` with a hub name."""
        try:
            is_folder = Path(place).is_dir()
        except OSError:  # a name that is too long
            is_folder = False
        return {"hub" if self.is_on_hub(place) and not is_folder else "source": place}


def read_settings(environment: Mapping[str, str]) -> Settings | None:
    """Return the settings; None if no folder of adapters is named, so that the plug-in does nothing.

    Raises:
        ValueError: A folder or a command that does not exist, or text in place of a number.
    """
    named = environment.get(ADAPTERS)
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{ADAPTERS} is {named!r}, which is not a folder; name the folder of your adapters.")
    python = environment.get(PYTHON) or sys.executable
    if shutil.which(python) is None:
        raise ValueError(f"{PYTHON} is {python!r}, which is not a command; name the Python of an environment.")
    reload = environment.get(RELOAD) or "0"
    if reload not in ("0", "1"):
        raise ValueError(f"{RELOAD} is {reload!r}, expected 0 or 1.")
    settle = environment.get(SETTLE) or str(DEFAULT_SETTLE_S)
    try:
        settle_s = float(settle)
    except ValueError:
        settle_s = -1
    if not 0 <= settle_s <= MOST_SETTLE_S:  # a NaN, too
        raise ValueError(f"{SETTLE} is {settle!r}, expected a number of seconds from 0 to {MOST_SETTLE_S:g}.")
    return Settings(
        adapters=folder.resolve(),
        cache=Path(environment.get(CACHE) or DEFAULT_CACHE).expanduser().absolute(),
        python=python,
        threads=_number(environment, THREADS) or DEFAULT_THREADS,
        approximate=_number(environment, APPROXIMATE),
        prepare=_listed(environment.get(PREPARE)),
        hub=_listed(environment.get(HUB_ALLOW)),
        reload=reload == "1",
        settle_s=settle_s,
    )


def folder_of(adapters: Path, name: str) -> Path | None:
    """Return the folder of an adapter; None if there is none.

    Args:
        adapters: Folder of all adapters, without links in its path.
        name: Name that a request gives.

    Raises:
        RefusedError: A name, or a link in the adapter's folder, that leads out of the folder of adapters.
    """
    if "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise RefusedError(f"{name!r} cannot be the name of an adapter: it would lead out of the folder of adapters.")
    folder = adapters / name
    try:
        if not folder.is_dir():
            return None
        places = [folder, *folder.iterdir()]
    except OSError as error:  # a name that is too long, or a folder that may not be entered
        raise RefusedError(f"{name!r} cannot be looked up: {error.strerror}.") from error
    if not all(place.resolve().is_relative_to(adapters) for place in places):
        raise RefusedError(f"{name!r} has a link that leads out of the folder of adapters; copy its files instead.")
    return folder


def _number(environment: Mapping[str, str], name: str) -> int | None:
    found = environment.get(name)
    if not found:
        return None
    if not found.isdecimal() or int(found) < 1:
        raise ValueError(f"{name} is {found!r}, expected a whole number of 1 or more.")
    return int(found)


def _listed(found: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (found or "").split(",") if part.strip())
