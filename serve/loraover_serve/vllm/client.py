"""Requests to a vLLM server: completions, and adapters loaded and unloaded while it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from loraover.common.errors import EngineError
from loraover.common.http import explanation, http_client

REQUEST_TIMEOUT_S = 600.0
HEALTH_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Completion:
    """Greedy continuation of one prompt.

    Args:
        token_ids: generated.
        logprobs: nats, of each generated token given all before it.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Streamed(Completion):
    """A continuation that came piece by piece.

    Args:
        start_s: when the request was sent, on `time.perf_counter`'s clock.
        piece_s: when each piece of the answer had arrived.
    """

    start_s: float
    piece_s: tuple[float, ...]


class VllmClient:
    """One server, by its address.

    Args:
        api_key: the server's key, sent with every request; None sends none.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url
        key = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        headers = {"Content-Type": "application/json", **key}
        self._client = http_client(headers, timeout_s=REQUEST_TIMEOUT_S, is_near=True)

    def is_healthy(self) -> bool:
        """Whether the server answers at all; a model may still fail at its first request."""
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
        """Of the server."""
        answer = self._request("/version")
        with _readable("/version", answer):
            return str(answer["version"])

    def complete(
        self, model: str, prompt: Sequence[int], *, max_tokens: int, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> Completion:
        """`complete_batch` of one prompt."""
        return self.complete_batch(model, [prompt], max_tokens=max_tokens, timeout_s=timeout_s)[0]

    def complete_batch(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> list[Completion]:
        """Greedy continuations of token sequences, of exactly `max_tokens` tokens each, end of text or not.

        Args:
            timeout_s: longest silence.

        Raises:
            EngineError: no such model, or the engine failed or stayed silent.
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
        """The greedy continuation of one prompt, with the times at which its pieces came.

        Args:
            timeout_s: longest silence.

        Raises:
            EngineError: no such model, an engine that failed or hung, or an answer of another length, model or
                prompt, or without its logprobs.
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
                            raise EngineError(f"{model}: the answer is to another prompt.")
                        text += choice["text"]
                        ids += choice["token_ids"] or []
                        logprobs += (choice["logprobs"] or {}).get("token_logprobs", [])
                        times.append(now)
        if len(ids) != max_tokens:
            raise EngineError(f"{model}: {len(ids)} tokens of {max_tokens} came; the answer was cut off.")
        if len(logprobs) != len(ids):
            raise EngineError(f"{model}: {len(logprobs)} logprobs came with {len(ids)} tokens.")
        return Streamed(text, tuple(ids), tuple(logprobs), start, tuple(times))

    def load_adapter(self, name: str, path: Path) -> None:
        """Make a folder on the server's machine known under a name.

        Raises:
            EngineError: the name is taken, the folder missing or refused, or loading not allowed.
        """
        self._request("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path.absolute())})

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            EngineError: no such adapter.
        """
        self._request("/v1/unload_lora_adapter", {"lora_name": name})

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
    r"""The lines of an answer as they come, and at its end what there is of the last one.

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
    """Take what the block needs from an answer, which may lack it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{asked}: the answer is not what vLLM's would be: {answer!r:.500}") from error


def _check_addressee(model: str, answer: dict[str, Any]) -> None:
    if answer.get("model") != model:
        raise EngineError(f"{model}: the answer is of {answer.get('model')!r}, another model or adapter.")


def _greedy_body(model: str, prompt: list[int] | list[list[int]], max_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
    }
