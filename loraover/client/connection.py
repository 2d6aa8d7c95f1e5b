"""HTTP with the standard library alone: each request has its own connection, which is closed at its deadline."""

from __future__ import annotations

import base64
import http.client
import math
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from loraover.common.errors import printable
from loraover.common.hosts import is_near

EXPLANATION_BYTES = 1000
SHORTEST_PAUSE_S = 0.1  # a server that rounds down asks for 0 seconds
IN_PATHS = "/%:@!$&'()*+,;=~"
NO_ANSWER = (OSError, http.client.HTTPException)
"""Errors of a request that gets no answer."""


class Proxy(NamedTuple):
    """A proxy, and the credentials that are sent to it."""

    host: str
    port: int
    headers: dict[str, str]


class Connections:
    """Connections to one server, of which any number of threads can have one at a time.

    No redirects are followed, since a key is meant for one server. Every request opens a new connection, so that none
    depends on what a server does with idle ones, and a balancer chooses anew. Answers are requested without
    compression, which would change the pieces in which they arrive.

    Args:
        url: Address of the server, with http or https and a host.
        ca_file: PEM file of certificates that sign the server's; None means those of the system.

    Raises:
        OSError: A file that holds no certificates.
        ValueError: The environment names a proxy that cannot be used.
    """

    def __init__(self, url: str, ca_file: str | None = None) -> None:
        parts = urlsplit(url)
        self._host, self._url = str(parts.hostname), f"{parts.scheme}://{parts.netloc}"
        self._path = quote(parts.path, safe=IN_PATHS)
        self._context = None
        if parts.scheme == "https":
            if ca_file is None and ssl.get_default_verify_paths().cafile is None:  # as Python from python.org on macOS
                with suppress(ImportError):
                    import certifi

                    ca_file = certifi.where()
            self._context = ssl.create_default_context(cafile=ca_file)
        self._port = parts.port or (80 if self._context is None else 443)
        self._proxy = None if is_near(self._host) else _proxy(parts.scheme, f"{self._host}:{self._port}")
        self._open = set[Callable[[], None]]()

    @contextmanager
    def send(
        self, path: str, content: bytes | None, headers: Mapping[str, str], silence_s: float, deadline: float = math.inf
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a POST of `content`, or a GET, and yield its response while it arrives, whatever its status.

        It ends after `silence_s` without a byte, and at `deadline` on `time.monotonic`'s clock, however slowly the
        server sends.
        """
        connection, target, more = self._connection(self._path + path, silence_s)
        sockets: list[socket.socket] = []

        def cut() -> None:
            for each in (*sockets, connection.sock):
                with suppress(OSError, TypeError):  # it has been closed, or is not there yet
                    socket.socket.shutdown(each, socket.SHUT_RDWR)  # `SSLSocket.shutdown` would go on without TLS

        timer = threading.Timer(min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX), cut)
        timer.daemon = True
        if math.isfinite(deadline):
            timer.start()
        self._open.add(cut)
        try:
            try:
                connection.connect()
            except UnicodeError as error:
                raise OSError(f"not the name of a host: {error}") from None
            sockets.append(connection.sock)
            if time.monotonic() >= deadline:
                raise TimeoutError("timed out")
            connection.request("GET" if content is None else "POST", target, content, {**headers, **more})
            with connection.getresponse() as response:
                yield response
        finally:
            timer.cancel()
            self._open.discard(cut)
            connection.close()

    def _connection(self, path: str, silence_s: float) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
        """Make a connection without opening it; return it with a request's target and the proxy's headers."""
        host, port, headers = self._proxy or (self._host, self._port, {})
        if self._context is None:
            plain = http.client.HTTPConnection(host, port, timeout=silence_s)
            return plain, path if self._proxy is None else self._url + path, headers
        secure = http.client.HTTPSConnection(host, port, timeout=silence_s, context=self._context)
        if self._proxy is not None:
            secure.set_tunnel(self._host, self._port, headers)
        return secure, path, {}

    def close(self) -> None:
        """Cut off all connections; requests of other threads fail."""
        for cut in [*self._open]:
            cut()


def _proxy(scheme: str, place: str) -> Proxy | None:
    """The proxy that the environment names for a host and port, if any."""
    from urllib.request import getproxies, proxy_bypass  # which a server on this machine does not need

    known = getproxies()
    address = known.get(scheme) or known.get("all")
    if not address or proxy_bypass(place):
        return None
    with suppress(ValueError):  # whose text may have a part of the password
        parts = urlsplit(address if "//" in address else f"http://{address}")
        user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
        basic = base64.b64encode(user.encode()).decode()
        more = {"Proxy-Authorization": f"Basic {basic}"} if user != ":" else {}
        if parts.scheme == "http" and parts.hostname and parts.netloc.count("@") == address.count("@"):
            return Proxy(parts.hostname, parts.port or 80, more)
    raise ValueError(
        "expected http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, with %2F for a / in the password; proxies of "
        "other kinds, such as socks5://, are not supported."
    )


def explanation(refusal: http.client.HTTPResponse, hidden: Callable[[str, bool], str]) -> str:
    """Return the beginning of a refusal's text; `hidden` hides secrets in it, and is told whether it was cut."""
    try:
        text = refusal.read(EXPLANATION_BYTES)
        if refusal.length and len(text) < EXPLANATION_BYTES:  # `read` of a number of bytes ends without an error there
            raise http.client.IncompleteRead(text, refusal.length)
    except NO_ANSWER as error:
        return f"its explanation broke off: {error}"
    return hidden(printable(text.decode(errors="replace")), len(text) == EXPLANATION_BYTES)


def asked_pause(refusal: http.client.HTTPResponse) -> float | None:
    """Seconds after which a server wants to be asked again (Retry-After: seconds or a date); None if it names none."""
    told = refusal.headers.get("Retry-After", "")
    try:
        seconds = float(told)
    except ValueError:
        try:
            date = parsedate_to_datetime(told)
        except (ValueError, OverflowError):  # the latter of a year or a zone that no date has
            return None
        zoned = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (zoned - datetime.now(UTC)).total_seconds()
    return max(seconds, SHORTEST_PAUSE_S) if math.isfinite(seconds) else None
