"""Adapters and models from wherever a text says they are, as folders of this machine, each complete or absent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loraover.common.atomic_output import publish_directory
from loraover.common.errors import OutputError
from loraover.common.file_lock import hold_lock
from loraover.common.paths import cache_folder
from loraover.sources.address import Address, HubName, SourceError, address_text, read_address
from loraover.sources.hub import HubUnreachableError, fetch_repository
from loraover.sources.stores import check_name, open_store

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


@dataclass(frozen=True)
class Fetched:
    """A folder of this machine, and where its files come from.

    Args:
        folder: The folder.
        address: Text that names the same files again: a path, an address with its secrets, or a hub name with its
            commit.
    """

    folder: Path
    address: str


def fetch_adapter(source: str | Path, say: Callable[[str], None]) -> Fetched:
    """Return the folder of an adapter.

    Args:
        source: Folder, hub name such as "owner/name@revision", or address such as "s3://bucket/folder".
        say: Function that shows a line to the user.

    Raises:
        ConfigError: The adapter cannot be fetched.
        OutputError: The cache cannot be written.
    """
    found = read_address(source)
    match found:
        case Path():
            return Fetched(found, address_text(source))
        case HubName():
            try:
                folder = fetch_repository(found.name, found.revision, "model", ADAPTER_FILES)
            except HubUnreachableError as error:
                raise HubUnreachableError(f"{source}: there is no such folder here, and {error}") from error
            pinned = HubName(found.name, folder.name)
            say(f"adapter: hub {pinned}")
            return Fetched(folder, str(pinned))
        case Address():
            return Fetched(fetch_address(found, ADAPTER_FILES, say), address_text(source))


def fetch_address(address: Address, wanted: tuple[str, ...], say: Callable[[str], None]) -> Path:
    """Return a folder of this machine with the present files of a folder elsewhere, named by a digest of them.

    Files that were fetched before, and have not changed since, are not fetched again. Several processes that want the
    same files wait for the one that fetches them.

    Args:
        address: Address of the folder, which the digest covers.
        wanted: Names of files, or patterns of names.
        say: Function that shows a line to the user.

    Raises:
        SourceError: The folder cannot be read, holds none of the files, names one that would lie outside of the cache,
            or changed while it was read.
        OutputError: The cache cannot be written.
    """
    store = open_store(address)
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

    def changed(name: str) -> SourceError:
        return SourceError(
            f"{address}: {name} changed while it was read, so that the files may not belong together; run this again."
        )

    with hold_lock(folder.with_name(f".{key}.lock"), wait=True):
        if folder.is_dir():
            return folder
        say(f"fetching {address} ({sum(entry.size for entry in found.values()) / 2**20:.1f} MiB)")
        with publish_directory(folder) as draft:
            for name, entry in found.items():
                store.read(name, draft / name, entry.size)
                if (draft / name).stat().st_size != entry.size:
                    raise changed(name)
            now = store.entries(wanted)
            for name in sorted(found.keys() | now.keys()):
                if now.get(name) != found.get(name):
                    raise changed(name)
    return folder
