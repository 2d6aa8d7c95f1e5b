"""A server that speaks as much of OpenAI's protocol as the tests need, and keeps what it was sent."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.http_server import Handler, serving


@dataclass(frozen=True)
class Refusal:
    """A refusal with headers of its own."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """The bytes to send, with headers of their own."""

    content: bytes
    headers: Mapping[str, str]


Reply = Callable[[dict[str, Any]], str | int | bytes | Refusal | Answer]
"""From a request's body: the text of the answer, or the HTTP status of a refusal, or the bytes to send."""


@dataclass
class Recorded:
    """One running server."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


def response(said: Any, body: Mapping[str, Any], key: str | None) -> tuple[int, bytes, Mapping[str, str]]:
    """Status, content and headers of what a reply says."""
    refusal = Refusal(said) if isinstance(said, int) else said
    if isinstance(refusal, Refusal):
        return refusal.status, f"refused, for {key}".encode(), refusal.headers
    if isinstance(said, Answer):
        return 200, said.content, said.headers
    if isinstance(said, bytes):
        return 200, said, {}
    choice = {"message": {"content": said}} if "messages" in body else {"text": said}
    return 200, json.dumps({"choices": [{"index": 0, **choice}]}).encode(), {}


@contextmanager
def openai_server(
    reply: Reply,
    models: Sequence[str] | Mapping[str, str | None] = (),
    key: tuple[str, str] | None = None,
    certificate: Path | None = None,
    pages: Mapping[str, Callable[[], str]] = {},
) -> Iterator[Recorded]:
    """Answers `/v1/completions`, `/v1/chat/completions` and, with models to list, `/v1/models` during a block.

    Args:
        reply: The answer to a request.
        models: Names to list, or the name of each one's base model by its own.
        key: Header that every request must have, and its value.
        certificate: PEM file of a certificate and its key, with which the server speaks TLS.
        pages: Functions that return the text of further pages, by their paths.
    """
    parents = models if isinstance(models, Mapping) else dict.fromkeys(models)

    class Speaker(Handler):
        def do_GET(self) -> None:
            if self.path in pages:
                self._send(200, pages[self.path]().encode())
                return
            listed = {"data": [{"id": name, "parent": parent} for name, parent in parents.items()]}
            self._send(self._refused() or (200 if parents else 404), json.dumps(listed).encode())

        def do_POST(self) -> None:
            body = json.loads(self.body())
            recorded.bodies.append({"path": self.path, **body})
            recorded.headers.append(dict(self.headers))
            self._send(*response(self._refused() or reply(body), body, self.headers.get("Authorization")))

        def _refused(self) -> int:
            return 0 if key is None or self.headers.get(key[0]) == key[1] else 401

        def _send(self, status: int, content: bytes, headers: Mapping[str, str] = {}) -> None:
            moved = {"Location": f"{recorded.url}/elsewhere"} if 300 <= status < 400 else {}
            self.answer(status, content, {**headers, **moved, "Content-Type": "application/json"})

    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    with serving(Speaker, context) as url:
        recorded = Recorded(url)
        yield recorded
