"""Connections of the client: their settings, and the time at which one is cut off."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

EXPLANATION_BYTES = 1000
SHORTEST_PAUSE_S = 0.1  # a server that rounds down asks for 0 seconds


def http_client(headers: Mapping[str, str], *, is_near: bool) -> httpx2.Client:
    """Make a client that any number of threads can share.

    It follows no redirects, since a key is meant for one server. Every request opens a new connection, so that none
    depends on what a server does with idle ones. Answers are requested without compression, which would change the
    pieces in which they arrive.

    Args:
        headers: Headers of every request.
        is_near: Whether the server is on this machine, so that a proxy for other machines must not be used.

    Raises:
        ImportError, ValueError, httpx2.InvalidURL: The environment names a proxy that cannot be used.
    """
    return httpx2.Client(
        headers={"Accept-Encoding": "identity", **headers},
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        trust_env=not is_near,
    )


@contextmanager
def cut_off_at(deadline: float) -> Iterator[dict[str, Any]]:
    """Extensions of a request whose connection ends at a time, however slowly the server sends.

    httpx2's own timeouts limit a silence, and each byte of an answer or of its headers ends a silence.

    Args:
        deadline: Time on `time.monotonic`'s clock.
    """
    sockets: list[socket.socket] = []

    def cut() -> None:
        for each in sockets:
            with suppress(OSError):  # it has been closed
                socket.socket.shutdown(each, socket.SHUT_RDWR)  # `SSLSocket.shutdown` would go on without encryption

    def watch(event: str, info: Mapping[str, Any]) -> None:
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            sockets.append(info["return_value"].get_extra_info("socket"))
            if time.monotonic() >= deadline:
                cut()

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), cut)
    timer.daemon = True
    timer.start()
    try:
        yield {"trace": watch}
    finally:
        timer.cancel()


def explanation(refusal: httpx2.Response) -> str:
    """Return the beginning of the text of a refusal whose body has not been read."""
    found = b""
    try:
        for piece in refusal.iter_bytes():
            found += piece
            if len(found) >= EXPLANATION_BYTES:
                break
    except httpx2.HTTPError as error:
        return f"its explanation broke off: {error}"
    return found[:EXPLANATION_BYTES].decode(errors="replace")


def asked_pause(refusal: httpx2.Response) -> float | None:
    """Seconds after which a server wants to be asked again (Retry-After: seconds or a date); None if it names none."""
    told = refusal.headers.get("Retry-After", "")
    try:
        seconds = float(told)
    except ValueError:
        try:
            date = parsedate_to_datetime(told)
        except ValueError:
            return None
        zoned = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (zoned - datetime.now(UTC)).total_seconds()
    return max(seconds, SHORTEST_PAUSE_S) if math.isfinite(seconds) else None
