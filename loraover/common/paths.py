"""Kinds of paths, and the folders in which this project keeps files."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path, PosixPath
from typing import Literal, NamedTuple, Self

from loraover.common.errors import ConfigError

ROOTED = ("file", "local", "hdfs")
"""Schemes of addresses that need not name a host, such as "file:///folder"."""

_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?P<slashes>/+)(?P<rest>[^/].*)", re.DOTALL)
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:/+)([^/?#\s]*)@")
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:/+[^?\s]*\?)(\S*)")
_VALUE = re.compile(r"(?<==)[^&]*|^[^=]+$")


def without_secrets(text: str) -> str:
    """Return a text whose addresses are shown to others: with *** for their users, passwords and values of queries.

    The container of "abfss://container@account/folder", a user without a password, stays as it is.
    """

    def without_user(found: re.Match[str]) -> str:
        is_container = ":" not in found[2] and not found[1].lower().startswith("http")
        return found[0] if is_container else f"{found[1]}***@"

    return _QUERY.sub(lambda found: found[1] + _VALUE.sub("***", found[2]), _USER.sub(without_user, text))


def one_below(file: Path) -> str:
    """Return a question that ends a message about a missing file: is a folder just below, with such a file, meant?

    It is empty if there is none. The folder of a run has its adapter in such a folder.
    """
    try:
        found = min(file.parent.glob(f"*/{file.name}"), default=None)
    except OSError:
        return ""
    return "" if found is None else f" Is {found.parent} meant?"


def split_address(text: str) -> tuple[str, str] | None:
    """Return what stands before and behind "://" in an address; None if a text is another path.

    An address may have lost slashes, as it does in a `Path`. Without a host, what stands behind begins with a slash.
    """
    found = _SCHEME.fullmatch(text)
    if found is None:
        return None
    is_rooted = found["scheme"].lower() in ROOTED and len(found["slashes"]) != 2
    return found["scheme"], "/" * is_rooted + found["rest"]


class AddressPath(PosixPath):
    """A path that may be an address, such as "s3://bucket/folder", whose text it keeps."""

    _text: str | None = None

    def __new__(cls, *parts: str | Path) -> Self:
        found = super().__new__(cls, *parts)
        found._text = str(parts[0]) if len(parts) == 1 else None
        return found

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (str(self),)

    def __str__(self) -> str:
        path = super().__str__()
        found = split_address(self._text or path)
        return path if found is None else f"{found[0]}://{found[1]}"


def kind_of(path: str | Path) -> Literal["file", "folder"] | None:
    """Whether a path leads to a file or a folder; None if to nothing, or to something else, such as a pipe.

    `Path.is_file` and `Path.is_dir` raise some of the system's errors and, from Python 3.14 on, take all of them for a
    missing file.

    Raises:
        ConfigError: The system cannot say, since the path is too long, or a folder on it may not be entered.
    """
    try:
        mode = Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null character
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be accessed: {error.strerror or error}; check the path.") from error
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else None


class Listing(NamedTuple):
    """Contents of a folder and of those below it, by paths in it, without hidden files and folders.

    Args:
        files: Regular files, and links to them, as in the hub's cache.
        others: Paths of all else but folders: links to folders or to nothing, pipes, devices.
    """

    files: dict[str, Path]
    others: list[str]


def list_folder(folder: Path) -> Listing:
    """Return what is in a folder, apart from the hidden folders that git and the hub's client keep in their copies."""
    listing = Listing({}, [])
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_file():
            listing.files[path.name] = path
        elif path.is_dir() and not path.is_symlink():
            found = list_folder(path)
            listing.files.update({f"{path.name}/{name}": file for name, file in found.files.items()})
            listing.others.extend(f"{path.name}/{name}" for name in found.others)
        else:
            listing.others.append(path.name)
    return listing


def cache_folder() -> Path:
    """Return the folder for what can be made or fetched again: `$XDG_CACHE_HOME/loraover` or `~/.cache/loraover`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "loraover"
