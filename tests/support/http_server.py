"""HTTP servers that run in a thread of a test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ssl import SSLContext
from typing import Any

POLL_S = 0.02
"""How often a server of tests looks whether it shall end; the library's own half a second adds up over a suite."""


class Handler(BaseHTTPRequestHandler):
    """Answers, and prints nothing."""

    def body(self) -> bytes:
        """Read what was sent."""
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Send an answer, to HEAD without its content."""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


class Server(ThreadingHTTPServer):
    """Takes many connections at once, where the library's own resets all but five that wait."""

    daemon_threads = True
    request_queue_size = 512


@contextmanager
def serving(
    handler: Callable[..., BaseHTTPRequestHandler], tls: SSLContext | None = None, port: int = 0
) -> Iterator[str]:
    """Run a server of this machine during a block, on a port or on any free one; yields its address."""
    with Server(("127.0.0.1", port), handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(POLL_S,), daemon=True)
        thread.start()
        try:
            yield f"http{'' if tls is None else 's'}://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
