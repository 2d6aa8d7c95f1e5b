"""Adapters and models from wherever a text says they are, as folders of this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loraover.sources.address import Address, HubName, address_text, read_address
from loraover.sources.cache import ADAPTER_FILES, Store, keep
from loraover.sources.hub import HubUnreachableError, fetch_repository


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
    """Return a folder of this machine with the wanted files of a folder elsewhere; see `keep`."""
    return keep(address, _store(address), wanted, say)


def _store(address: Address) -> Store:
    """Return the folder at an address; what opens it is imported now."""
    if address.scheme in ("http", "https"):
        from loraover.sources.web import WebStore

        return WebStore(address)
    from loraover.sources.remote import RemoteStore

    return RemoteStore(address)
