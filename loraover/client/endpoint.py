"""Requests to a server that speaks OpenAI's protocol, such as vLLM.

This module and those that it imports need the standard library alone, and are packed into the checker of
`loraover record`.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPResponse
from typing import Any, ClassVar
from urllib.parse import urlsplit

from loraover.client.connection import NO_ANSWER, Connections, asked_pause, explanation
from loraover.client.dialects import GREEDY
from loraover.common.errors import ConfigError, EngineError, printable

REQUEST_TIMEOUT_S = 300.0
UNFIT, ABSENT, LIMITED = {400, 413, 422}, {404, 405, 501}, {429}
TRANSIENT = LIMITED | {408, 409, 425, 500, 502, 503, 504}
PAUSES_S = (1.0, 4.0)
LARGEST_ANSWER, HEADER_CHARACTERS = 2**26, 200  # bytes of an answer, and characters of a header that are kept
SHOWN_CHARACTERS = 500  # of an answer that cannot be read
VERSIONS = {"vllm": ("/version", "version"), "llamacpp": ("/props", "build_info")}
"""Paths at which engines tell their version, and its key, by the owner that they name of their models."""
_VERSION = re.compile(r"[\w.+-]{1,60}", re.ASCII)
SECRET_CHARACTERS = 8  # a shorter key, such as "token", can be a part of any text
_DATE = r"[-@:](\d{4}|\d{6}|\d{8}|\d{4}-\d{2}-\d{2})"


class UnansweredError(EngineError):
    """A request that failed, though the same one might succeed later.

    Args:
        message: What happened.
        pause_s: Seconds after which the server wants to be asked again; None if it names none.
        is_limit: Whether the server has had too many requests.
        is_status: Whether the server answered, with an HTTP status.
        is_refused: Whether nothing accepted the connection.
    """

    def __init__(
        self,
        message: str,
        pause_s: float | None = None,
        *,
        is_limit: bool = False,
        is_status: bool = False,
        is_refused: bool = False,
    ) -> None:
        super().__init__(message)
        self.pause_s, self.is_limit, self.is_status, self.is_refused = pause_s, is_limit, is_status, is_refused


class NotJsonError(UnansweredError):
    """An answer that is not JSON, such as none at all after a failure within the server."""


class UnfitRequestError(EngineError):
    """A request that the server refuses for its content, such as a text that exceeds the model's context."""


class AbsentError(EngineError):
    """A request for a path or a model that the server does not have."""


class OtherModelError(EngineError):
    """An answer that says that another model gave it."""


class Endpoint:
    """OpenAI-compatible server.

    Args:
        url: The server's address, with or without the final `/v1`.
        key_variable: Environment variable with the key; it is sent to the server and shown to nobody.
        timeout_s: Longest time of a request in seconds, with its repetitions and the pauses that the server asks for.
        repeats: Whether a request that might succeed later is repeated.
        more: Further headers, as NAME=VARIABLE with the environment variable that holds the value, which is as secret.
        ca_file: PEM file of certificates that sign the server's; None means those of the system.
        ends: Time on `time.monotonic`'s clock at which all requests end.

    Raises:
        ConfigError: Not an HTTP address, no such variable, a key that no header can carry, a header's name that none
            can have, no certificates, or a proxy or a time that cannot be used.
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
        more: Sequence[str] = (),
        ca_file: str | None = None,
        ends: float = math.inf,
    ) -> None:
        host = _host(url)
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.headers = {"Content-Type": "application/json", "User-Agent": "loraover"}  # some refuse who has no name
        self._key = "" if key_variable is None else _secret(host, key_variable)
        if self._key:  # servers read one of the two
            self.headers |= {"Authorization": f"Bearer {self._key}", "X-Api-Key": self._key}
        others = {}
        for each in more:  # one that cannot be used is not shown: it may hold the value
            name, _, variable = each.partition("=")
            if not variable or not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
                raise ConfigError(
                    f"a header for {host}: lacks a variable, or its name is not valid for a header; give "
                    "NAME=VARIABLE, such as X-Team=TEAM_KEY."
                )
            others[name] = _secret(host, variable)
        self.headers |= others
        found = [secret for secret in (self._key, *others.values()) if secret]
        # As messages may have them: as they are, in JSON, and in what Python prints of an answer.
        self._secrets = {form for secret in found for form in (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1])}
        try:
            self._connections = Connections(self.url, ca_file)
        except OSError as error:
            raise ConfigError(f"{ca_file}: cannot be read as certificates: {error}.") from error
        except ValueError as error:
            raise ConfigError(f"{host}: the environment's proxy cannot be used: {error}") from error
        if not 0 < timeout_s <= threading.TIMEOUT_MAX:
            raise ConfigError(
                f"{host}: the time-out is {timeout_s:g} s, expected more than 0 and at most {threading.TIMEOUT_MAX:g}."
            )
        self._timeout_s, self._repeats, self.ends = timeout_s, repeats, ends
        self._closed, self._turn = threading.Event(), threading.RLock()
        self.sent, self._counting = 0, threading.Lock()
        """Number of requests that were sent."""

    @property
    def api(self) -> str:
        """Address that the paths of OpenAI's protocol are below."""
        return f"{self.url}/v1"

    @property
    def is_over(self) -> bool:
        """Whether the time for all requests is over."""
        return time.monotonic() >= self.ends

    def close(self) -> None:
        """Close the connections; requests of other threads fail, and are not repeated."""
        self._closed.set()
        self._connections.close()

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
        return str(self.exchange("/v1/completions", body, timeout_s=timeout_s, text=("text",))[0])

    def chat(self, model: str, messages: Sequence[dict[str, str]], *, max_tokens: int, temperature: float = 0.0) -> str:
        """Ask for the answer to a conversation of messages with `role` and `content`; the temperature 0 is greedy.

        Raises:
            EngineError: See `ask`.
        """
        body = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": temperature}
        return str(self.exchange("/v1/chat/completions", body, text=("message", "content"))[0])

    def request(self, path: str, body: dict[str, Any] | None = None, *, timeout_s: float | None = None) -> Any:
        """Send a POST of `body`, or a GET, again after a pause where that may help; return the JSON of the answer.

        Raises:
            EngineError: See `ask`.
        """
        return self.exchange(path, body, timeout_s=timeout_s)[0]

    def page(self, path: str) -> str:
        """Text of a page of the server, such as "/metrics"; empty if it has none, or the time for requests is over."""
        now = time.monotonic()
        deadline = min(now + self._timeout_s, self.ends)
        if now < deadline:
            with suppress(EngineError), self._open(path, None, deadline - now, deadline) as found:
                return found.read(LARGEST_ANSWER).decode(errors="replace")
        return ""

    def models(self) -> dict[str, str | None]:
        """Names of the models that the server lists, with that of an adapter's base model where the list has it.

        The result is empty if the server has no such list.
        """
        try:
            listed = self.request("/v1/models")
            return {str(model["id"]): model.get("parent") for model in listed["data"]}
        except (UnfitRequestError, AbsentError, NotJsonError, LookupError, TypeError, AttributeError):
            return {}  # mlx_lm.server answers with nothing where Hugging Face's cache has no folder

    def root(self, model: str) -> str | None:
        """Path of a model that the server lists, as vLLM does; None if it lists none."""
        with suppress(EngineError, LookupError, TypeError, AttributeError):
            listed = self.request("/v1/models")["data"]
            found = next((each.get("root") for each in listed if each["id"] == model), None)
            return None if found is None else printable(str(found))
        return None

    def engine(self) -> tuple[str, str] | None:
        """Engine of the server, by the name that `--engine` takes, and its version; None if the server names neither.

        vLLM and llama-server name themselves as the owner of their models.
        """
        with suppress(ValueError, LookupError, TypeError, RecursionError):
            owner = str(json.loads(self.page("/v1/models"))["data"][0]["owned_by"])
            path, key = VERSIONS[owner]
            if _VERSION.fullmatch(version := json.loads(self.page(path))[key]):
                return owner, version
        return None

    @contextmanager
    def readable(self, model: str, answer: Any, *, is_named: bool = True) -> Iterator[None]:
        """Raise an EngineError if another model answered, or if the answer lacks something that the block reads.

        Without `is_named`, the answer may name another model.
        """
        try:
            speaker = answer.get("model")
            if is_named and speaker and not is_same_model(str(speaker), model):
                found = f"{model} was asked, and {speaker!r} answered; is the adapter loaded under that name?"
                raise OtherModelError(self.hidden(found))
            yield
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            message = f"{model}: the server's answer cannot be read: {self.beginning(answer)}"
            raise EngineError(self.hidden(message)) from error

    def hidden(self, text: str, is_cut: bool = False) -> str:
        """A message with the key and other secret headers replaced, since servers may repeat them.

        One that `is_cut` off may end within a secret.
        """
        for secret in sorted(self._secrets, key=len, reverse=True):  # one may be a part of another
            text = text.replace(secret, "***")
        parts = (secret[:length] for secret in self._secrets for length in range(len(secret) - 1, 0, -1))
        part = next(filter(text.endswith, parts), "") if is_cut else ""
        return f"{text.removesuffix(part)}***" if part else text

    def beginning(self, answer: Any) -> str:
        """The beginning of an answer for a message; secrets are hidden first, since a cut one is not recognised."""
        return self.hidden(repr(answer))[:SHOWN_CHARACTERS]

    def exchange(
        self, path: str, body: dict[str, Any] | None = None, *, timeout_s: float | None = None, text: Sequence[str] = ()
    ) -> tuple[Any, dict[str, str]]:
        """Send a request as `request` does, and return the answer with its headers.

        A request that the server refuses because of its rate limit is sent again later. Until it is answered, the
        other requests wait. The time that a request waits for others does not count towards its own time-out.

        Args:
            path: Path of the request.
            body: JSON to send; None sends a GET request.
            timeout_s: Seconds to wait for the answer; None: those of the endpoint.
            text: Keys that lead to a text in the answer; if they are given, the text is returned in place of the
                answer.

        Returns:
            The answer, and its headers without cookies, by their names in small letters.
        """
        longest = min(self._timeout_s if timeout_s is None else timeout_s, threading.TIMEOUT_MAX)
        with self._turn:
            pass
        deadline, pauses = min(time.monotonic() + longest, self.ends), iter(PAUSES_S if self._repeats else ())
        with ExitStack() as turn:
            while True:
                try:
                    answer, told = self._answer(path, body, deadline, longest)
                    return self._text(answer, text) if text else answer, told
                except UnansweredError as error:
                    pause = error.pause_s if self._repeats else None
                    again = time.monotonic() + (next(pauses, math.inf) if pause is None else pause)
                    if again > deadline:
                        raise
                    if error.is_limit:
                        before = time.monotonic()
                        turn.enter_context(self._turn)
                        deadline = min(deadline + time.monotonic() - before, self.ends)
                    if self._closed.wait(max(0.0, again - time.monotonic())):
                        raise

    def _answer(
        self, path: str, body: dict[str, Any] | None, deadline: float, longest: float
    ) -> tuple[Any, dict[str, str]]:
        left, content, told = max(deadline - time.monotonic(), 0.001), b"", dict[str, str]()
        try:
            with self._open(path, body, left, deadline) as response:
                content = response.read(LARGEST_ANSWER + 1)
                headers = ((name.lower(), self.hidden(value)) for name, value in response.headers.items())
                told = {name: printable(value[:HEADER_CHARACTERS]) for name, value in headers if name != "set-cookie"}
        except UnansweredError:
            if time.monotonic() < deadline:
                raise
        if (now := time.monotonic()) >= deadline:
            over = f"timed out after {longest:g} s"
            if now >= self.ends:
                over = f"the time limit for all requests was reached after {self.sent} requests; allow more time"
            raise UnansweredError(f"{self.url}{path}: no answer: {over}")
        if len(content) > LARGEST_ANSWER:
            raise EngineError(f"{self.url}{path}: the answer is longer than {LARGEST_ANSWER} bytes.")
        try:
            return json.loads(content.decode(errors="replace")), told
        except (ValueError, RecursionError) as error:
            raise NotJsonError(self.hidden(f"{self.url}{path}: the answer is not JSON: {error}")) from None

    @contextmanager
    def _open(
        self, path: str, body: dict[str, Any] | None, silence_s: float, deadline: float = math.inf
    ) -> Iterator[HTTPResponse]:
        """Send a request, and yield its answer while it arrives; too long a silence is an error."""
        content = None if body is None else json.dumps(body).encode()
        with self._counting:
            self.sent += 1
        try:
            with self._connections.send(path, content, self.headers, silence_s, deadline) as response:
                if not 200 <= response.status < 300:
                    raise self._refusal(path, response)
                yield response
        except NO_ANSWER as error:
            is_refused = isinstance(error, ConnectionRefusedError)
            raise UnansweredError(self.hidden(f"{self.url}{path}: no answer: {error}"), is_refused=is_refused) from None

    def _refusal(self, path: str, response: HTTPResponse) -> EngineError:
        status, pause = response.status, asked_pause(response)
        asks = "" if pause is None else f" (it asks for a pause of {pause:g} s)"
        if 300 <= status < 400 and (goal := response.headers.get("Location")):
            asks += f" (a redirect, which is not followed, to {self.hidden(printable(goal))[:HEADER_CHARACTERS]})"
        found = explanation(response, self.hidden)
        message = self.hidden(f"{self.url}{path}: the server answered {status}{asks}: {found}")
        if status in TRANSIENT:
            is_limit = pause is not None or status in LIMITED
            return UnansweredError(message, pause, is_limit=is_limit, is_status=True)
        kind = UnfitRequestError if status in UNFIT else AbsentError if status in ABSENT else EngineError
        return kind(message)

    def _text(self, answer: Any, keys: Sequence[str]) -> str:
        """Text of an answer, to be kept: a key that it repeats is replaced, unless the key could be part of any word.

        Half a character, which JSON can hold but a file cannot, becomes a question mark.
        """
        try:
            found = answer["choices"][0]
            for key in keys:
                found = found[key]
        except (LookupError, TypeError) as error:
            raise UnansweredError(f"the server's answer holds no text: {self.beginning(answer)}") from error
        text = found.encode(errors="replace").decode() if isinstance(found, str) else ""  # null: an empty answer
        return text if len(self._key) < SECRET_CHARACTERS else self.hidden(text)


def is_same_model(one: str, other: str) -> bool:
    """Whether two names mean one model: one may have a prefix, as `models/shop`, or a date, as `shop-2026-08-06`."""
    short, long = sorted((one, other), key=len)
    tail = long.removeprefix(short)
    return short == long or long.endswith((f"/{short}", f":{short}")) or bool(re.fullmatch(_DATE, tail))


def _secret(host: str, variable: str) -> str:
    """Value of an environment variable that a request carries to a host."""
    found = os.environ.get(variable, "").strip()
    if not found:
        raise ConfigError(  # the name is not shown: it may be the key itself
            f"the key of {host}: the given name is not that of an environment variable that is set; give the name of "
            "the variable, not the key itself."
        )
    if not found.isascii() or not found.isprintable():
        raise ConfigError(f"the key of {host}: holds characters that a header must not contain.")
    return found


def _host(url: str) -> str:
    """Host of a server's address; raise ConfigError unless that is HTTP's, without a user or a query."""
    with suppress(ValueError):
        parts = urlsplit(url)
        is_plain = "@" not in parts.netloc and not parts.query and parts.port != 0  # no number raises a ValueError
        if parts.scheme in ("http", "https") and parts.hostname and is_plain:
            return parts.hostname
    shown = "the address" if "@" in url or "?" in url else repr(url)  # there, it may hold a secret
    raise ConfigError(
        f"{shown} is not the address of a server; expected e.g. http://localhost:8000/v1, without user or query."
    )
