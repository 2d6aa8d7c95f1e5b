"""Requests to a server that speaks OpenAI's protocol, such as vLLM."""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, TypeVar

import httpx2

from loraover.client.connection import asked_pause, cut_off_at, explanation, http_client
from loraover.client.dialects import GREEDY
from loraover.common.errors import ConfigError, EngineError

REQUEST_TIMEOUT_S = 300.0
UNFIT, ABSENT, LIMITED = {400, 413, 422}, {404, 405, 501}, {429}
TRANSIENT = LIMITED | {408, 409, 425, 500, 502, 503, 504}
PAUSES_S = (1.0, 4.0)
SECRET_CHARACTERS = 8  # a shorter key, such as "token", can be a part of any text
_DATE = r"[-@:](\d{4}|\d{6}|\d{8}|\d{4}-\d{2}-\d{2})"

T = TypeVar("T")


class UnansweredError(EngineError):
    """A request that failed, though the same one might succeed later.

    Args:
        message: What happened.
        pause_s: Seconds after which the server wants to be asked again; None if it names none.
        is_limit: Whether the server has had too many requests.
    """

    def __init__(self, message: str, pause_s: float | None = None, *, is_limit: bool = False) -> None:
        super().__init__(message)
        self.pause_s, self.is_limit = pause_s, is_limit


class UnfitRequestError(EngineError):
    """A request that the server refuses for its content, such as a text that exceeds the model's context."""


class AbsentError(EngineError):
    """A request for a path or a model that the server does not have."""


class Endpoint:
    """One OpenAI-compatible server.

    Args:
        url: The server's address, with or without the final `/v1`.
        key_variable: Environment variable with the key; it is sent to the server and shown to nobody.
        timeout_s: Longest time of a request in seconds, with its repetitions and the pauses that the server asks for.
        repeats: Whether a request that might succeed later is repeated.

    Raises:
        ConfigError: Not an HTTP address, no such variable, a key that no header can carry, or a proxy that cannot
            be used.
    """

    GREEDY: ClassVar[Mapping[str, Any]] = GREEDY
    """Fields that ask for the likeliest token at each position."""

    def __init__(
        self,
        url: str,
        key_variable: str | None = None,
        *,
        timeout_s: float = REQUEST_TIMEOUT_S,
        repeats: bool = True,
    ) -> None:
        host = _host(url)
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.headers = {"Content-Type": "application/json"}
        self._key = "" if key_variable is None else os.environ.get(key_variable, "").strip()
        if key_variable is not None and not self._key:
            raise ConfigError(  # the name is not shown: it may be the key itself
                f"the key of {host}: no environment variable of the name that was given is set; give the "
                "variable's name, not the key."
            )
        if not self._key.isascii() or not self._key.isprintable():
            raise ConfigError(f"the key of {host}: holds characters that no header can carry.")
        if self._key:  # servers read one of the two
            self.headers |= {"Authorization": f"Bearer {self._key}", "X-Api-Key": self._key}
        is_near = host in ("localhost", "::1") or host.startswith("127.")
        try:
            self._client = http_client(self.headers, is_near=is_near)
        except (ImportError, ValueError, httpx2.InvalidURL) as error:
            raise ConfigError(f"{host}: the environment's proxy cannot be used: {error}") from error
        self._timeout_s, self._repeats = timeout_s, repeats
        self._closed, self._turn = threading.Event(), threading.RLock()

    @property
    def api(self) -> str:
        """Address that the paths of OpenAI's protocol are below."""
        return f"{self.url}/v1"

    def close(self) -> None:
        """Close the connections; requests of other threads fail, and are not repeated."""
        self._closed.set()
        self._client.close()

    def ask(
        self,
        model: str,
        prompt: str,
        *,
        max_tokens: int = 64,
        stop: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> str:
        """Ask for the greedy continuation of a text, up to its end or `max_tokens` tokens.

        Args:
            model: Name of the model or adapter on the server.
            prompt: The text.
            max_tokens: Largest number of tokens in the continuation.
            stop: Texts before which it ends.
            timeout_s: Longest time in seconds; None means that of the client.

        Raises:
            EngineError: The server refused, or did not answer repeated requests.
        """
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, **self.GREEDY}
        body |= {"stop": list(stop)} if stop else {}
        return self._asked("/v1/completions", body, timeout_s, lambda answer: self._text(answer, "text"))

    def chat(self, model: str, messages: Sequence[dict[str, str]], *, max_tokens: int, temperature: float = 0.0) -> str:
        """Ask for the answer to a conversation.

        Args:
            model: Name of the model on the server.
            messages: The conversation, each message with `role` and `content`.
            max_tokens: Largest number of tokens in the answer.
            temperature: Temperature of sampling; 0 is greedy.

        Raises:
            EngineError: See `ask`.
        """
        body = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": temperature}
        return self._asked("/v1/chat/completions", body, None, lambda answer: self._text(answer, "message", "content"))

    def request(self, path: str, body: dict[str, Any] | None = None, *, timeout_s: float | None = None) -> Any:
        """Send a request, again after a pause where that may help, and return the JSON of the answer.

        Args:
            path: Path on the server, such as "/v1/completions".
            body: Contents of a POST; None sends a GET.
            timeout_s: Longest time in seconds; None means that of the client.

        Raises:
            EngineError: See `ask`.
        """
        return self._asked(path, body, timeout_s, lambda answer: answer)

    def models(self) -> dict[str, str | None]:
        """Names of the models that the server lists, with that of an adapter's base model where the list has it.

        The result is empty if the server has no such list.

        Raises:
            EngineError: No answer, or a key that the server refuses.
        """
        try:
            listed = self.request("/v1/models")
            return {str(model["id"]): model.get("parent") for model in listed["data"]}
        except (UnfitRequestError, AbsentError, LookupError, TypeError, AttributeError):
            return {}

    @contextmanager
    def readable(self, model: str, answer: Any) -> Iterator[None]:
        """Raise an EngineError if another model answered, or if the answer lacks something that the block reads."""
        try:
            speaker = answer.get("model")
            if speaker and not is_same_model(str(speaker), model):
                found = f"{model} was asked, and {speaker!r} answered; is the adapter loaded under that name?"
                raise EngineError(self.hidden(found))
            yield
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            message = f"{model}: the server's answer cannot be read: {answer!r:.500}"
            raise EngineError(self.hidden(message)) from error

    def hidden(self, text: str) -> str:
        """A message with the key replaced, since servers may repeat it."""
        return text.replace(self._key, "***") if self._key else text

    def _asked(self, path: str, body: dict[str, Any] | None, timeout_s: float | None, read: Callable[[Any], T]) -> T:
        """What `read` makes of the answer to a request, which is sent again after a pause where that may help.

        A request that the server's limit refuses holds back the others until it is answered, and the time for which it
        was held back itself does not count.
        """
        longest = self._timeout_s if timeout_s is None else timeout_s
        with self._turn:
            pass
        deadline, pauses = time.monotonic() + longest, iter(PAUSES_S if self._repeats else ())
        with ExitStack() as turn:
            while True:
                try:
                    return read(self._answer(path, body, deadline, longest))
                except UnansweredError as error:
                    told = error.pause_s if self._repeats else None
                    again = time.monotonic() + (next(pauses, math.inf) if told is None else told)
                    if again > deadline:
                        raise
                    if error.is_limit:
                        before = time.monotonic()
                        turn.enter_context(self._turn)
                        deadline += time.monotonic() - before
                    if self._closed.wait(max(0.0, again - time.monotonic())):
                        raise

    def _answer(self, path: str, body: dict[str, Any] | None, deadline: float, longest: float) -> Any:
        left = max(deadline - time.monotonic(), 0.001)
        try:
            with cut_off_at(deadline) as extensions, self._open(path, body, left, extensions) as response:
                content = response.read().decode(errors="replace")
        except UnansweredError:
            if time.monotonic() < deadline:
                raise
            content = ""
        if time.monotonic() >= deadline:
            raise UnansweredError(f"{self.url}{path}: no answer: timed out after {longest:g} s")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UnansweredError(self.hidden(f"{self.url}{path}: the answer is not JSON: {error}")) from None

    @contextmanager
    def _open(
        self, path: str, body: dict[str, Any] | None, silence_s: float, extensions: dict[str, Any] | None = None
    ) -> Iterator[httpx2.Response]:
        """Send a request, and give its answer while that arrives with no longer silence."""
        method, content = ("GET", None) if body is None else ("POST", json.dumps(body))
        options: dict[str, Any] = {"content": content, "timeout": silence_s, "extensions": extensions}
        try:
            with self._client.stream(method, self.url + path, **options) as response:
                if not response.is_success:
                    raise self._refusal(path, response)
                yield response
        except httpx2.HTTPError as error:
            raise UnansweredError(self.hidden(f"{self.url}{path}: no answer: {error}")) from None

    def _refusal(self, path: str, response: httpx2.Response) -> EngineError:
        status, pause = response.status_code, asked_pause(response)
        asks = "" if pause is None else f" (it asks for a pause of {pause:g} s)"
        message = self.hidden(f"{self.url}{path}: the server answered {status}{asks}: {explanation(response)}")
        if status in TRANSIENT:
            return UnansweredError(message, pause, is_limit=pause is not None or status in LIMITED)
        kind = UnfitRequestError if status in UNFIT else AbsentError if status in ABSENT else EngineError
        return kind(message)

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


def is_same_model(one: str, other: str) -> bool:
    """Whether two names mean one model: one may have a prefix, as `models/shop`, or a date, as `shop-2026-08-06`."""
    short, long = sorted((one, other), key=len)
    tail = long.removeprefix(short)
    return short == long or long.endswith((f"/{short}", f":{short}")) or bool(re.fullmatch(_DATE, tail))


def _host(url: str) -> str:
    """Host of a server's address.

    Raises:
        ConfigError: Not an HTTP address, or one with a user or a query.
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
