"""Folders of files that were fetched, each complete or absent, and named by a digest of what was fetched."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from loraover.common.atomic_output import publish_directory
from loraover.common.errors import ConfigError, OutputError
from loraover.common.file_lock import hold_lock
from loraover.common.paths import cache_folder

if TYPE_CHECKING:
    from loraover.sources.address import Address

ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "loraover.json",
    "loraover.safetensors",
    "README.md",
    "adapter_reference.json.gz",
    "adapter_reference.kept.json",
)
CONFIG_FILES = ("config.json",)
MODEL_FILES = (
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"),
    *("tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("added_tokens.json", "spiece.model", "chat_template.jinja", "README.md"),
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"),
)
"""Files of a model: first the names to ask a server for that lists nothing, then patterns for those that list."""


class SourceError(ConfigError):
    """An address whose files cannot be fetched."""


@dataclass(frozen=True)
class Entry:
    """File at an address elsewhere.

    Args:
        size: Number of bytes.
        mark: Text that changes when the file does, such as its ETag.
    """

    size: int
    mark: str


class Store(ABC):
    """A folder elsewhere."""

    @abstractmethod
    def entries(self, wanted: tuple[str, ...]) -> Mapping[str, Entry]:
        """Return the files of the folder that are wanted, by name, as they are now.

        Args:
            wanted: Names of files, or patterns of names.

        Raises:
            SourceError: There is no such folder, or it cannot be reached.
        """

    @abstractmethod
    def read(self, name: str, target: Path, size: int) -> None:
        """Copy a file to a new one on this machine.

        Args:
            name: Name of the file.
            target: The new file.
            size: Number of bytes that the file has; of a file that has more, the rest need not be read.

        Raises:
            SourceError: The file cannot be read.
            OSError: The new file cannot be written.
        """


def keep(address: Address, store: Store, wanted: tuple[str, ...], say: Callable[[str], None]) -> Path:
    """Return a folder of this machine with the present files of a folder elsewhere.

    Files that were fetched before, and have not changed since, are not fetched again. Several processes that want the
    same files wait for the one that fetches them.

    Args:
        address: Address of the folder, which the digest covers.
        store: The folder.
        wanted: Names of files, or patterns of names.
        say: Function that shows a line to the user.

    Raises:
        SourceError: The folder holds none of the files, names one that would lie outside of the cache, or changed while
            it was read.
        OutputError: The cache cannot be written.
    """
    found = dict(sorted(store.entries(wanted).items()))
    if not found:
        raise SourceError(f"{address}: holds none of {', '.join(wanted[:2])}; expected the address of their folder.")
    for name in found:
        check_name(str(address), name)
    described = json.dumps([address.text, {name: [entry.size, entry.mark] for name, entry in found.items()}])
    key = hashlib.sha256(described.encode()).hexdigest()
    folder = cache_folder() / "sources" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot write the cache {folder.parent}: {error.strerror}; set XDG_CACHE_HOME to another folder."
        ) from error
    with hold_lock(folder.with_name(f".{key}.lock"), wait=True):
        if folder.is_dir():
            return folder
        say(f"fetching {address} ({sum(entry.size for entry in found.values()) / 2**20:.1f} MiB)")
        with publish_directory(folder) as draft:
            for name, entry in found.items():
                store.read(name, draft / name, entry.size)
                if (draft / name).stat().st_size != entry.size:
                    raise SourceError(_changed(address, name))
            now = store.entries(wanted)
            for name in sorted(found.keys() | now.keys()):
                if now.get(name) != found.get(name):
                    raise SourceError(_changed(address, name))
    return folder


def are_wanted(names: Mapping[str, Entry], wanted: tuple[str, ...]) -> dict[str, Entry]:
    """Return the entries whose names are wanted, and those that are not the name of a file, which `keep` refuses."""
    is_plain = {name: _is_plain(name) for name in names}
    return {
        name: entry
        for name, entry in names.items()
        if not is_plain[name] or any(fnmatch(name, pattern) for pattern in wanted)
    }


def check_name(address: str, name: str) -> None:
    """Raise SourceError if a name that was found at an address is not the plain name of a file."""
    if not _is_plain(name):
        raise SourceError(
            f"{address}: holds a file named {name!r}, which would lie outside of the cache; expected plain names. "
            "Nothing was fetched: remove that file, or do not use this address."
        )


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and os.sep not in name and "\0" not in name


def _changed(address: Address, name: str) -> str:
    return f"{address}: {name} changed while it was read, so that the files may not belong together; run this again."
