"""Requests to a server with the standard library alone."""

from __future__ import annotations

import http.client
import json
import math
import os
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from loraover_serve.record.adapter_check.reference import CheckError

LARGEST_ANSWER = 8_000_000  # bytes
TRANSIENT, UNFIT, PAUSES_S = {408, 409, 425, 429, 500, 502, 503, 504}, {400, 404, 405, 413, 422, 501}, (1.0, 4.0, 16.0)
NEAR = ("localhost", "127.0.0.1", "::1")


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are refusals: the key is meant for one server."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Server:
    """A server, asked through a fresh connection each time.

    Args:
        url: Its address, with or without the final /v1.
        headers: Headers of every request.
        deadline: Time on time.monotonic's clock at which everything ends.
        context: TLS settings; None means those of Python.
    """

    def __init__(
        self, url: str, headers: Mapping[str, str], deadline: float, context: ssl.SSLContext | None = None
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise CheckError(
                "that is not the address of a server; expected e.g. http://localhost:8000, without user or query."
            )
        self.url, self.deadline = url.rstrip("/").removesuffix("/v1").rstrip("/"), deadline
        self.sent, self._counting = 0, threading.Lock()
        self.headers = {"Content-Type": "application/json", **headers}
        proxies = [urllib.request.ProxyHandler({})] if parts.hostname in NEAR else []
        self._opener = urllib.request.build_opener(NoRedirect, urllib.request.HTTPSHandler(context=context), *proxies)

    def ask(self, path: str, body: Any = None) -> tuple[Any, dict[str, str]]:
        """The JSON of an answer, and its headers by their names in small letters; asked again where that may help."""
        pauses = iter(PAUSES_S)
        while True:
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as error:
                told = f"{self.url}{path}: the server answered {error.code}: {error.read(300).decode(errors='replace')}"
                told, asked = self._hidden(told), error.headers.get("Retry-After", "")
                if error.code not in TRANSIENT:
                    raise (UnfitError if error.code in UNFIT else CheckError)(told) from None
            except (OSError, ValueError, http.client.HTTPException) as error:
                told, asked = self._hidden(f"{self.url}{path}: no answer: {error}"), ""
            pause = next(pauses, math.inf)
            pause = float(asked) if asked.isdecimal() else pause
            if time.monotonic() + pause > self.deadline:
                raise CheckError(told)
            time.sleep(pause)

    def _once(self, path: str, body: Any) -> tuple[Any, dict[str, str]]:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise CheckError(f"{self.url}: no time is left (--timeout).")
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)
        content = b""
        with self._counting:
            self.sent += 1
        with self._opener.open(request, timeout=left) as response:
            while piece := response.read1(65536):
                content += piece
                if len(content) > LARGEST_ANSWER or time.monotonic() > self.deadline:
                    raise CheckError(f"{self.url}{path}: the answer is too long or too slow.")
            told = {name.lower(): value for name, value in response.headers.items()}
        return json.loads(content), told

    def _hidden(self, text: str) -> str:
        secrets = [value.removeprefix("Bearer ") for name, value in self.headers.items() if name != "Content-Type"]
        return next((text.replace(each, "***") for each in secrets if each and each in text), text)


class UnfitError(CheckError):
    """A request that the server refuses for its form, or a path that it does not have."""


def headers(key_variable: str | None, more: Sequence[str] = ()) -> dict[str, str]:
    """Headers of a request, whose values come from environment variables alone."""
    pairs = [(name, variable, "") for name, _, variable in (each.partition("=") for each in more)]
    pairs += [("Authorization", key_variable, "Bearer ")] if key_variable else []
    if any(not os.environ.get(variable, "").isprintable() or not os.environ.get(variable) for _, variable, _ in pairs):
        raise CheckError("an environment variable with a key or a header is not set; give its name, not the key.")
    return {name: kind + os.environ[variable].strip() for name, variable, kind in pairs}


def tls(ca_file: str | None) -> ssl.SSLContext | None:
    """TLS settings with certificates of one's own."""
    try:
        return None if ca_file is None else ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise CheckError(f"{ca_file}: cannot be read as certificates: {error}.") from None
