"""Adapters and models from wherever a text says they are, as folders of this machine, each complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, final
from urllib.parse import urljoin, urlsplit

from loraover.common.atomic_output import publish_directory
from loraover.common.errors import OutputError
from loraover.common.extras import install
from loraover.common.file_lock import hold_lock
from loraover.common.hosts import is_near
from loraover.common.paths import cache_folder
from loraover.sources.address import Address, HubName, SourceError, address_text, read_address
from loraover.sources.hub import HubUnreachableError, fetch_repository

if TYPE_CHECKING:
    import httpx2

ABSENT = (403, 404, 410)
"""Answers for files that are not there; servers that list nothing say 403 for these."""

INDEX_FILE = "model.safetensors.index.json"

REDIRECTS = 5

TIMEOUT_S = 60

PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}

FOREIGN = {"botocore.exceptions": "BotoCoreError", "ftplib": "Error"}
"""Errors that derive from no built-in one, by their modules."""

VOLATILE = ("expires", "atime", "accessed")

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
class Entry:
    """A file elsewhere: its number of bytes, and a mark that changes when it does, such as an ETag."""

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


def open_store(address: Address) -> Store:
    """Return the folder at an address, after importing the package that reads its scheme."""
    return WebStore(address) if address.scheme in ("http", "https") else RemoteStore(address)


def check_name(address: str, name: str) -> None:
    """Raise SourceError if a name that was found at an address is not the plain name of a file."""
    if not _is_plain(name):
        raise SourceError(
            f"{address}: holds a file named {name!r}, which would lie outside of the cache; expected plain names. "
            "Nothing was fetched: remove that file, or do not use this address."
        )


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and os.sep not in name and "\0" not in name


@final
class WebStore(Store):
    """A folder of a web server, which is read over https, and over http from this machine only.

    A server may redirect to itself and to no other host: a user named this one.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._parts = urlsplit(address.text)
        if address.scheme != "https" and not is_near(self._parts.hostname or ""):
            raise SourceError(
                f"{address}: is read without encryption, so others on the network could change it; use https."
            )

    def entries(self, wanted: tuple[str, ...]) -> Mapping[str, Entry]:
        with self._client() as client:
            names = [name for name in wanted if "*" not in name]
            if INDEX_FILE in names:
                names += self._shards(client)
            found: dict[str, Entry] = {}
            for name in names:
                with self._answer(client, "HEAD", name) as answer:
                    size, mark = answer.headers.get("Content-Length"), answer.headers.get("ETag")
                    mark = mark or answer.headers.get("Last-Modified")
                if answer.status_code in ABSENT:
                    continue
                if mark is None or size is None:
                    lacks = "size" if size is None else "ETag or Last-Modified"
                    raise SourceError(
                        f"{self._address}/{name}: the server states no {lacks}, so a change of the file would not be "
                        "noticed. Download the folder, and name the copy."
                    )
                found[name] = Entry(int(size), mark)
        return found

    def read(self, name: str, target: Path, size: int) -> None:
        with self._client() as client, self._answer(client, "GET", name) as answer, target.open("wb") as file:
            for piece in answer.iter_bytes():
                file.write(piece)
                if file.tell() > size:
                    return

    def _shards(self, client: httpx2.Client) -> list[str]:
        """Return the files of weights that the index names."""
        from loraover.common.strict_json import MAX_JSON_BYTES  # with pydantic, which help texts do not wait for

        with self._answer(client, "GET", INDEX_FILE) as answer:
            if answer.status_code in ABSENT:
                return []
            content = bytearray()
            for piece in answer.iter_bytes():
                content += piece
                if len(content) > MAX_JSON_BYTES:
                    raise SourceError(f"{self._address}/{INDEX_FILE}: more than {MAX_JSON_BYTES} bytes of JSON.")
            try:
                names = sorted(set(map(str, json.loads(content)["weight_map"].values())))
            except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
                raise SourceError(f"{self._address}/{INDEX_FILE}: is not an index of weights: {error!r}.") from error
        for name in names:
            check_name(str(self._address), name)
        return names

    @contextmanager
    def _client(self) -> Iterator[httpx2.Client]:
        import httpx2

        here = is_near(self._parts.hostname or "")
        headers = {"Accept-Encoding": "identity"}  # the sizes are those of the files
        with httpx2.Client(headers=headers, timeout=TIMEOUT_S, trust_env=not here) as client:
            try:
                yield client
            except httpx2.HTTPError as error:
                raise SourceError(f"{self._address}: cannot be reached: {error}") from error
            except httpx2.InvalidURL as error:
                raise SourceError(f"{self._address}: is not an address of a web server: {error}") from error

    @contextmanager
    def _answer(self, client: httpx2.Client, method: str, name: str) -> Iterator[Any]:
        """Yield the answer to a request, after redirects of the same host."""
        url = self._parts._replace(path=f"{self._parts.path}/{name}").geturl()
        for _ in range(REDIRECTS + 1):
            with client.stream(method, url) as answer:
                if not answer.has_redirect_location:
                    if answer.status_code not in (200, *ABSENT):
                        raise SourceError(f"{self._address}/{name}: the server answers {answer.status_code}.")
                    yield answer
                    return
                url = urljoin(url, answer.headers["Location"])
            if urlsplit(url)[:2] != self._parts[:2]:
                raise SourceError(
                    f"{self._address}/{name}: the server redirects to another host, {urlsplit(url).netloc!r}; name the "
                    "address there if you trust it."
                )
        raise SourceError(f"{self._address}/{name}: the server redirects more than {REDIRECTS} times.")


@final
class RemoteStore(Store):
    """A folder that fsspec opens, with the credentials of the environment."""

    def __init__(self, address: Address) -> None:
        self._address = address
        try:
            from fsspec.core import url_to_fs

            with self._errors():
                self._system, root = url_to_fs(address.text)  # at the host and the port that the address names
        except TypeError as error:
            raise SourceError(
                f"{address}: lacks a part that {address.scheme}:// needs: {error}; write the address as fsspec takes "
                "it."
            ) from error
        except ImportError as error:
            package = PACKAGES.get(address.scheme, "fsspec")
            raise SourceError(
                f"{address}: this needs {package}, which is not installed ({error}): "
                f"{install('remote') if package in ('s3fs', 'fsspec') else f'pip install {package}'}"
            ) from error
        self._root = root.rstrip("/")

    def entries(self, wanted: tuple[str, ...]) -> Mapping[str, Entry]:
        with self._errors():
            self._system.invalidate_cache()
            root = f"{self._root}/"
            found = self._system.ls(root, detail=True)
        entries = {}
        for info in found:
            name = info["name"].removeprefix(root)
            is_file = info["type"] == "file" and info["name"] != root
            if is_file and (not _is_plain(name) or any(fnmatch(name, pattern) for pattern in wanted)):
                facts = sorted((fact, str(value)) for fact, value in info.items() if fact not in VOLATILE)
                mark = hashlib.sha256(repr(facts).encode()).hexdigest()  # the ETag and the time of change, where known
                entries[name] = Entry(int(info["size"] or 0), mark)
        return entries

    def read(self, name: str, target: Path, size: int) -> None:
        with self._errors():
            self._system.get_file(f"{self._root}/{name}", str(target))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn the errors of fsspec and of its packages into ours."""
        others = tuple(vars(sys.modules[name])[kind] for name, kind in FOREIGN.items() if name in sys.modules)
        try:
            yield
        except FileNotFoundError as error:
            raise SourceError(f"{self._address}: no such folder there: {error}; check the address.") from error
        except PermissionError as error:
            raise SourceError(
                f"{self._address}: access is refused: {error}; give credentials as {self._address.scheme} takes them."
            ) from error
        except others as error:
            raise SourceError(f"{self._address}: cannot be read: {error}") from error
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) is not None and getattr(error, "filename", None) is not None:
                raise  # an error of this machine's disk, which the writer of the cache explains
            raise SourceError(f"{self._address}: cannot be read: {error}") from error


@dataclass(frozen=True)
class Fetched:
    """A folder of this machine, and where its files come from.

    Args:
        address: Text that names the same files again: a path, an address with its secrets, or a hub name with its
            commit.
    """

    folder: Path
    address: str


def fetch_adapter(source: str | Path, say: Callable[[str], None]) -> Fetched:
    """Return the folder of an adapter: a folder, hub name such as "owner/name@revision", or address "s3://...".

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
            f"{address}: {name} changed while it was read, so the files may not belong together; run the command again."
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
