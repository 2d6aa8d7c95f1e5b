"""Requests to a vLLM server: completions, at once or piece by piece, and its models, version and health."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from loraover.common.errors import EngineError
from loraover.common.http import explanation, http_client

REQUEST_TIMEOUT_S = 600.0
HEALTH_TIMEOUT_S = 10.0
GREEDY = {"temperature": 0, "repetition_penalty": 1.0}
"""The likeliest token at each position, without the repetition penalty that many base models' folders set."""


@dataclass(frozen=True)
class Completion:
    """Greedy continuation of one prompt.

    Args:
        text: the generated text.
        token_ids: the generated tokens.
        logprobs: log-probability of each generated token given all tokens before it, in nats.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Streamed(Completion):
    """A continuation that arrived piece by piece.

    Args:
        start_s: time when the request was sent, in seconds on `time.perf_counter`'s clock.
        piece_s: time when each piece of the answer had arrived, in seconds on the same clock.
    """

    start_s: float
    piece_s: tuple[float, ...]


class VllmClient:
    """Requests to one server.

    Args:
        url: address of the server, such as "http://127.0.0.1:8000".
        api_key: the server's key, sent with every request; None sends none.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url
        key = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        headers = {"Content-Type": "application/json", **key}
        self._client = http_client(headers, timeout_s=REQUEST_TIMEOUT_S, is_near=True)

    def is_healthy(self) -> bool:
        """Whether the server reports that it is up; a model may still fail at its first request."""
        try:
            return self._health().is_success
        except httpx2.HTTPError:
            return False

    def _health(self) -> httpx2.Response:
        return self._client.get(f"{self.url}/health", timeout=HEALTH_TIMEOUT_S)

    def models(self) -> list[str]:
        """Names that requests can address: the base model and the adapters loaded now."""
        answer = self._request("/v1/models")
        with _readable("/v1/models", answer):
            return [model["id"] for model in answer["data"]]

    def version(self) -> str:
        """Version of vLLM that the server runs."""
        answer = self._request("/version")
        with _readable("/version", answer):
            return str(answer["version"])

    def ask(self, model: str, prompt: str, *, max_tokens: int = 64, timeout_s: float = REQUEST_TIMEOUT_S) -> str:
        """Greedy continuation of a text, up to its end or `max_tokens` tokens.

        Args:
            model: name of an adapter, or of the base model.
            prompt: the text to continue.
            max_tokens: largest number of tokens to generate.
            timeout_s: longest silence, in seconds.

        Raises:
            EngineError: a model that does not exist, or a server that failed or stayed silent.
        """
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, **GREEDY}
        answer = self._request("/v1/completions", body, timeout_s)
        with _readable(model, answer):
            _check_addressee(model, answer)
            return str(answer["choices"][0]["text"])

    def complete(
        self, model: str, prompt: Sequence[int], *, max_tokens: int, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> Completion:
        """Greedy continuation of one token sequence; see `complete_batch`."""
        return self.complete_batch(model, [prompt], max_tokens=max_tokens, timeout_s=timeout_s)[0]

    def complete_batch(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> list[Completion]:
        """Greedy continuations of token sequences, of exactly `max_tokens` tokens each, even beyond an end of text.

        Args:
            model: name of an adapter, or of the base model.
            prompts: token ids of each prompt.
            max_tokens: number of tokens to generate.
            timeout_s: longest silence, in seconds.

        Raises:
            EngineError: a model that does not exist, or a server that failed or stayed silent.
        """
        body = _greedy_body(model, [list(prompt) for prompt in prompts], max_tokens)
        answer = self._request("/v1/completions", body, timeout_s)
        with _readable(model, answer):
            _check_addressee(model, answer)
            return [
                Completion(choice["text"], tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))
                for choice in sorted(answer["choices"], key=lambda choice: choice["index"])
            ]

    def stream(self, model: str, prompt: Sequence[int], *, max_tokens: int, timeout_s: float) -> Streamed:
        """Greedy continuation of one prompt, with the times at which its pieces arrived.

        Args:
            model: name of an adapter, or of the base model.
            prompt: token ids.
            max_tokens: number of tokens to generate, even beyond an end of text.
            timeout_s: longest silence, in seconds.

        Raises:
            EngineError: a model that does not exist, a server that failed or stayed silent, or an answer of another
                length, model or prompt, or without its logprobs.
        """
        body = _greedy_body(model, list(prompt), max_tokens) | {"stream": True}
        text = ""
        ids: list[int] = []
        logprobs: list[float] = []
        times: list[float] = []
        start = time.perf_counter()
        with self._open("/v1/completions", body, timeout_s) as response:
            for line in _lines(response):
                if not line.startswith(b"data: {"):
                    continue
                now, piece = time.perf_counter(), _parsed(model, line[6:])
                if "choices" not in piece:
                    raise EngineError(f"{model}: the server failed in the middle of an answer: {piece!r:.500}")
                _check_addressee(model, piece)
                with _readable(model, piece):
                    for choice in piece["choices"]:
                        if choice.get("prompt_token_ids") not in (None, list(prompt)):
                            raise EngineError(f"{model}: the server answered another prompt.")
                        text += choice["text"]
                        ids += choice["token_ids"] or []
                        logprobs += (choice["logprobs"] or {}).get("token_logprobs", [])
                        times.append(now)
        if len(ids) != max_tokens:
            raise EngineError(f"{model}: {len(ids)} of {max_tokens} tokens arrived; the answer was cut off.")
        if len(logprobs) != len(ids):
            raise EngineError(f"{model}: {len(logprobs)} logprobs arrived with {len(ids)} tokens.")
        return Streamed(text, tuple(ids), tuple(logprobs), start, tuple(times))

    def _request(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = REQUEST_TIMEOUT_S) -> Any:
        with self._open(path, body, timeout_s) as response:
            content = response.read()
        try:
            return json.loads(content)
        except ValueError:
            return content.decode(errors="replace")

    @contextmanager
    def _open(self, path: str, body: dict[str, Any] | None, timeout_s: float) -> Iterator[httpx2.Response]:
        method, content = ("GET", None) if body is None else ("POST", json.dumps(body))
        try:
            with self._client.stream(method, self.url + path, content=content, timeout=timeout_s) as response:
                if not response.is_success:
                    raise EngineError(f"{path}: the server answered {response.status_code}: {explanation(response)}")
                yield response
        except httpx2.HTTPError as error:
            raise EngineError(f"{path}: no answer from {self.url}: {error}") from error


def _lines(response: httpx2.Response) -> Iterator[bytes]:
    r"""The lines of an answer as they arrive; the last one may be incomplete.

    `iter_lines` also divides at characters such as U+2028, which JSON may hold as they are.
    """
    rest = b""
    try:
        for piece in response.iter_bytes():
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
    except httpx2.RemoteProtocolError:  # it hung up
        if not rest:
            raise
    if rest:
        yield rest


def _parsed(model: str, text: bytes) -> dict[str, Any]:
    try:
        piece: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise EngineError(f"{model}: the answer broke off at {text!r:.500}.") from error
    return piece


@contextmanager
def _readable(asked: str, answer: Any) -> Iterator[None]:
    """Raise an EngineError if the answer lacks something that the block reads."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{asked}: the answer does not have the fields of vLLM's answers: {answer!r:.500}") from error


def _check_addressee(model: str, answer: dict[str, Any]) -> None:
    if answer.get("model") != model:
        raise EngineError(f"{model}: another model or adapter answered, {answer.get('model')!r}.")


def _greedy_body(model: str, prompt: list[int] | list[list[int]], max_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        **GREEDY,
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
    }
