"""HTTP settings that all clients of this project share."""

from __future__ import annotations

from collections.abc import Mapping

import httpx2

EXPLANATION_BYTES = 1000


def http_client(headers: Mapping[str, str], *, timeout_s: float, is_near: bool) -> httpx2.Client:
    """Make a client that any number of threads can share.

    It follows no redirects, since a key is meant for one server. Every request opens a new connection, so that none
    depends on what a server does with idle ones. Answers are requested without compression, which would change the
    pieces in which they arrive.

    Args:
        headers: Headers of every request.
        timeout_s: Longest silence in seconds: the limit of every read, not of a complete answer.
        is_near: Whether the server is on this machine, so that a proxy for other machines must not be used.

    Raises:
        ImportError, ValueError, httpx2.InvalidURL: The environment names a proxy that cannot be used.
    """
    return httpx2.Client(
        headers={"Accept-Encoding": "identity", **headers},
        timeout=timeout_s,
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        trust_env=not is_near,
    )


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
