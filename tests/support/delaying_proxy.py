"""A proxy in front of a vLLM server that delays the answers of one model by a share of their time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from queue import SimpleQueue
from urllib.request import ProxyHandler, Request, build_opener

from support.http_server import Handler, serving


@contextmanager
def delaying(url: str, model: str, share: float) -> Iterator[str]:
    """Forward completions; a piece that comes t seconds after a request for `model` is sent on after (1 + share) t."""
    opener = build_opener(ProxyHandler({}))

    class Proxy(Handler):
        def do_POST(self) -> None:
            start = time.perf_counter()
            body = self.body()
            stretch = 1 + share * (json.loads(body)["model"] == model)
            request = Request(url + self.path, body, {"Content-Type": "application/json"})
            lines: SimpleQueue[tuple[float, bytes] | None] = SimpleQueue()
            with opener.open(request) as answer:
                threading.Thread(target=collect, args=(answer, lines)).start()
                self.send_response(answer.status)
                self.end_headers()
                while (arrived := lines.get()) is not None:
                    at, line = arrived
                    time.sleep(max(0.0, start + stretch * (at - start) - time.perf_counter()))
                    self.wfile.write(line)

    with serving(Proxy) as address:
        yield address


def collect(answer: HTTPResponse, lines: SimpleQueue[tuple[float, bytes] | None]) -> None:
    """Put lines with their times of arrival into a queue, and None at the end."""
    for line in answer:
        lines.put((time.perf_counter(), line))
    lines.put(None)
