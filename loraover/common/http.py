"""Requests over HTTP, by httpx: what the clients of this project agree on."""

from __future__ import annotations

from collections.abc import Mapping

import httpx2

EXPLANATION_BYTES = 1000


def http_client(headers: Mapping[str, str], *, timeout_s: float, is_near: bool) -> httpx2.Client:
    """A client for any number of threads, which follows no redirect: a key is for one server.

    Every request has a connection of its own, so that none depends on what a server does with idle ones, and asks for
    an answer without compression, which would come in other pieces.

    Args:
        headers: headers of every request.
        timeout_s: longest silence, in seconds: the limit of every read, not of the whole answer.
        is_near: whether the server is on this machine, which a proxy for the outside world cannot reach.

    Raises:
        ImportError, ValueError, httpx2.InvalidURL: the environment names a proxy that cannot be used.
    """
    return httpx2.Client(
        headers={"Accept-Encoding": "identity", **headers},
        timeout=timeout_s,
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        trust_env=not is_near,
    )


def explanation(refusal: httpx2.Response) -> str:
    """The beginning of what came with a refusal whose body has not been read."""
    found = b""
    try:
        for piece in refusal.iter_bytes():
            found += piece
            if len(found) >= EXPLANATION_BYTES:
                break
    except httpx2.HTTPError as error:
        return f"its explanation broke off: {error}"
    return found[:EXPLANATION_BYTES].decode(errors="replace")
