"""Requests to a server that speaks OpenAI's protocol, such as vLLM."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import httpx2

from loraover.common.errors import ConfigError, EngineError
from loraover.common.http import explanation, http_client

REQUEST_TIMEOUT_S = 300.0
UNFIT = {400, 413, 422}
TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}
PAUSES_S = (1.0, 4.0)
SECRET_CHARACTERS = 8  # a shorter key, such as "token", can be a part of any text

T = TypeVar("T")


class UnansweredError(EngineError):
    """A request that failed, though the same one might succeed later."""


class UnfitRequestError(EngineError):
    """A request that the server refuses for its content, such as a text that exceeds the model's context."""


class Endpoint:
    """One OpenAI-compatible server.

    Args:
        url: The server's address, with or without the final `/v1`.
        key_variable: Environment variable with the key; it is sent to the server and shown to nobody.
        timeout_s: Longest silence, in seconds.

    Raises:
        ConfigError: not an HTTP address, no such variable, a key that no header can carry, or a proxy that cannot
            be used.
    """

    def __init__(self, url: str, key_variable: str | None = None, *, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        host = _host(url)
        self.url = url.rstrip("/") if url.rstrip("/").endswith("/v1") else url.rstrip("/") + "/v1"
        self.headers = {"Content-Type": "application/json"}
        self._key = "" if key_variable is None else os.environ.get(key_variable, "").strip()
        if key_variable is not None and not self._key:
            raise ConfigError(  # the name is not shown: it may be the key itself
                f"the key of {host}: no environment variable of the name that was given is set; give the "
                "variable's name, not the key."
            )
        if not self._key.isascii() or not self._key.isprintable():
            raise ConfigError(f"the key of {host}: holds characters that no header can carry.")
        if self._key:
            self.headers["Authorization"] = f"Bearer {self._key}"
        is_near = host in ("localhost", "::1") or host.startswith("127.")
        try:
            self._client = http_client(self.headers, timeout_s=timeout_s, is_near=is_near)
        except (ImportError, ValueError, httpx2.InvalidURL) as error:
            raise ConfigError(f"{host}: the environment's proxy cannot be used: {error}") from error
        self._is_closed = False

    def close(self) -> None:
        """Close the connections; requests of other threads fail, and are not repeated."""
        self._is_closed = True
        self._client.close()

    def complete(self, model: str, prompt: str, *, max_tokens: int, stop: Sequence[str] = ()) -> str:
        """Ask for the greedy continuation of a text.

        Args:
            model: Name of the model on the server.
            prompt: The text.
            max_tokens: Largest number of tokens in the continuation.
            stop: Texts before which it ends.

        Raises:
            EngineError: the server refused, or did not answer repeated requests.
        """
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0} | ({"stop": list(stop)} if stop else {})
        return self._ask(lambda: self._text(self._request("/completions", {"model": model, **body}), "text"))

    def chat(self, model: str, messages: Sequence[dict[str, str]], *, max_tokens: int, temperature: float = 0.0) -> str:
        """Ask for the answer to a conversation.

        Args:
            model: Name of the model on the server.
            messages: The conversation, each message with `role` and `content`.
            max_tokens: Largest number of tokens in the answer.
            temperature: Temperature of sampling; 0 is greedy.

        Raises:
            EngineError: see `complete`.
        """
        body = {"messages": list(messages), "max_tokens": max_tokens, "temperature": temperature}
        request = {"model": model, **body}
        return self._ask(lambda: self._text(self._request("/chat/completions", request), "message", "content"))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send a request, again after a pause where that may help, and return the JSON of the answer.

        Args:
            path: Path below `/v1`, such as "/completions".
            body: The request.

        Raises:
            EngineError: see `complete`.
        """
        return self._ask(lambda: self._request(path, body))

    def models(self) -> list[str]:
        """Names of the models that the server lists; none if it has no such list.

        Raises:
            EngineError: no answer, or a key that the server refuses.
        """
        try:
            answer = self._client.get(f"{self.url}/models")
        except httpx2.HTTPError as error:
            raise EngineError(self.hidden(f"{self.url}/models: no answer: {error}")) from None
        if answer.status_code in (401, 403):
            raise EngineError(
                self.hidden(f"{self.url}/models: the server answered {answer.status_code}: {answer.text:.300}")
            )
        try:
            return [str(model["id"]) for model in answer.json()["data"]] if answer.is_success else []
        except (ValueError, LookupError, TypeError):
            return []

    def _ask(self, ask: Callable[[], T]) -> T:
        """Return what `ask` returns, which is called again after a pause where that may help."""
        for pause in PAUSES_S:
            try:
                return ask()
            except UnansweredError:
                if self._is_closed:
                    raise
                time.sleep(pause)
        return ask()

    def _request(self, path: str, body: dict[str, Any]) -> Any:
        try:
            with self._client.stream("POST", self.url + path, content=json.dumps(body)) as response:
                if not response.is_success:
                    raise self._refusal(path, response)
                return json.loads(response.read().decode(errors="replace"))
        except httpx2.HTTPError as error:
            raise UnansweredError(self.hidden(f"{self.url}{path}: no answer: {error}")) from None
        except (ValueError, RecursionError) as error:
            raise UnansweredError(self.hidden(f"{self.url}{path}: the answer is not JSON: {error}")) from None

    def _refusal(self, path: str, response: httpx2.Response) -> EngineError:
        status = response.status_code
        kind = UnansweredError if status in TRANSIENT else UnfitRequestError if status in UNFIT else EngineError
        return kind(self.hidden(f"{self.url}{path}: the server answered {status}: {explanation(response)}"))

    def hidden(self, text: str) -> str:
        """A message with the key replaced, since servers may repeat it."""
        return text.replace(self._key, "***") if self._key else text

    def _text(self, answer: Any, *keys: str) -> str:
        """Text of an answer, which is kept: without a key that it repeats, unless the key could be part of any word.

        Half a character, which JSON can hold but a file cannot, becomes a question mark.
        """
        try:
            found = answer["choices"][0]
            for key in keys:
                found = found[key]
        except (LookupError, TypeError) as error:
            raise UnansweredError(self.hidden(f"the server's answer holds no text: {answer!r:.300}")) from error
        text = found.encode(errors="replace").decode() if isinstance(found, str) else ""  # null: an empty answer
        return text if len(self._key) < SECRET_CHARACTERS else self.hidden(text)


def _host(url: str) -> str:
    """Host of a server's address.

    Raises:
        ConfigError: not an HTTP address, or one with a user or a query.
    """
    try:
        parts = httpx2.URL(url)
        is_address = parts.scheme in ("http", "https") and parts.host and not parts.userinfo and not parts.query
    except httpx2.InvalidURL:
        is_address = False
    if is_address:
        return parts.host
    shown = "the address" if "@" in url or "?" in url else repr(url)  # there, it may hold a secret
    raise ConfigError(
        f"{shown} is not the address of a server; expected e.g. http://localhost:8000/v1, without user or query."
    )
