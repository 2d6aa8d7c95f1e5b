"""Kinds of places that a text names: a path of this machine, a repository of the hub, or an address elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from loraover.common.errors import ConfigError
from loraover.common.paths import kind_of, split_address, without_secrets

HUB_HOST = "huggingface.co"
_NAME = r"[\w-][\w.-]*/[\w.-]*[\w-]"
_HUB = re.compile(rf"(?P<name>{_NAME})(?:@(?P<revision>[^\s@]+))?", re.ASCII)
_HF = re.compile(rf"(?P<name>{_NAME})(?:@(?P<revision>[^\s@/]+))?/*", re.ASCII)
_PAGE = re.compile(rf"{HUB_HOST}/(?P<name>{_NAME})(?:/tree/(?P<revision>[^\s@]+?))?/*", re.ASCII)


class SourceError(ConfigError):
    """An address whose files cannot be fetched."""


@dataclass(frozen=True)
class HubName:
    """A repository of the hub.

    Args:
        name: Owner and name, such as "owner/adapter".
        revision: Branch, tag or commit; None means "main".
    """

    name: str
    revision: str | None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


@dataclass(frozen=True)
class Address:
    """A folder elsewhere.

    Args:
        scheme: Part before "://", such as "s3".
        rest: Part behind it, without a slash at the end; without a host, it begins with one.
    """

    scheme: str
    rest: str

    def __str__(self) -> str:
        """Return the address as it is shown; see `without_secrets`."""
        return without_secrets(self.text)

    @property
    def text(self) -> str:
        """The address with its secrets, for requests."""
        return f"{self.scheme}://{self.rest}"


def read_address(text: str | Path) -> Path | HubName | Address:
    """Return the place that a text names; a file or folder that exists comes before a name on the hub.

    Args:
        text: Path, hub name such as "owner/name" or "owner/name@revision", "hf://owner/name", or address such as
            "s3://bucket/folder".

    Raises:
        ConfigError: The address is one of the hub's, but names no repository of models or adapters.
    """
    text = str(text)
    with_scheme = split_address(text)
    if with_scheme is not None:
        scheme, rest = with_scheme[0].lower(), with_scheme[1].rstrip("/")
        is_page = scheme == "https" and rest.partition("/")[0] == HUB_HOST
        if scheme != "hf" and not is_page:
            return Address(scheme, rest)
        found = (_PAGE if is_page else _HF).fullmatch(rest)
        if found is None:
            raise ConfigError(
                f"{text}: names no repository of the hub; expected {'https' if is_page else 'hf'}://"
                f"{f'{HUB_HOST}/owner/name' if is_page else 'owner/name or hf://owner/name@revision'}."
            )
        return HubName(found["name"], found["revision"])
    named = _HUB.fullmatch(text)
    if named is None or text.startswith(".") or kind_of(text) is not None:
        return Path(text)
    return HubName(named["name"], named["revision"])


def address_text(text: str | Path) -> str:
    """Return the one spelling of the place that a text names, with the secrets of an address."""
    found = read_address(text)
    return found.text if isinstance(found, Address) else str(found)


def name_of(text: str | Path) -> str:
    """Return the last name of a folder, a repository or an address."""
    found = read_address(text)
    match found:
        case Path():
            return found.resolve().name
        case HubName():
            return found.name.rpartition("/")[2]
        case Address():
            return found.rest.partition("?")[0].rstrip("/").rpartition("/")[2]


def is_elsewhere(text: str | Path) -> bool:
    """Whether a text is an address with a scheme, such as "s3://bucket/folder"."""
    return split_address(str(text)) is not None
