"""Folders that a web server has, whose files are asked for by their names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from loraover.common.hosts import is_near
from loraover.common.strict_json import MAX_JSON_BYTES
from loraover.sources.cache import Entry, SourceError, Store, check_name

if TYPE_CHECKING:
    import httpx2

    from loraover.sources.address import Address

ABSENT = (403, 404, 410)
"""Answers for files that are not there; servers that list nothing say 403 for these."""
INDEX_FILE = "model.safetensors.index.json"
REDIRECTS = 5
TIMEOUT_S = 60


class WebStore(Store):
    """A folder of a web server, which is read over https, and over http from this machine only.

    A server may redirect to itself and to no other host: a user named this one.

    Args:
        address: The folder's address.

    Raises:
        SourceError: The address has no encryption.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._parts = urlsplit(address.text)
        if address.scheme != "https" and not is_near(self._parts.hostname or ""):
            raise SourceError(
                f"{address}: is read without encryption, so anybody on the way could change it; use https."
            )

    def entries(self, wanted: tuple[str, ...]) -> Mapping[str, Entry]:
        with self._client() as client:
            names = [name for name in wanted if "*" not in name]
            if INDEX_FILE in names:
                names += self._shards(client)
            found = {name: self._entry(client, name) for name in names}
        return {name: entry for name, entry in found.items() if entry is not None}

    def read(self, name: str, target: Path, size: int) -> None:
        with self._client() as client, self._answer(client, "GET", name) as answer, target.open("wb") as file:
            for piece in answer.iter_bytes():
                file.write(piece)
                if file.tell() > size:
                    return

    def _shards(self, client: httpx2.Client) -> list[str]:
        """Return the files of weights that the index names."""
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

    def _entry(self, client: httpx2.Client, name: str) -> Entry | None:
        with self._answer(client, "HEAD", name) as answer:
            if answer.status_code in ABSENT:
                return None
            size, mark = answer.headers.get("Content-Length"), answer.headers.get("ETag")
            mark = mark or answer.headers.get("Last-Modified")
        if mark is None or size is None:
            raise SourceError(
                f"{self._address}/{name}: the server states no {'size' if size is None else 'ETag or Last-Modified'}, "
                "so that a change of the file would not be noticed. Download the folder, and name the copy."
            )
        return Entry(int(size), mark)

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
