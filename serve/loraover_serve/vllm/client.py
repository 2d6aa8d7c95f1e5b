"""The client of a vLLM server: completions in tokens, at once or piece by piece, and whether the server is well."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPResponse, IncompleteRead
from pathlib import Path
from typing import Any, ClassVar

from loraover.client.connection import NO_ANSWER
from loraover.client.endpoint import Endpoint
from loraover.common.errors import EngineError

REQUEST_TIMEOUT_S, HEALTH_TIMEOUT_S = 600.0, 10.0
HEALTH_S = 2.0  # between two questions to a server that runs
PIECE_BYTES = 2**16


@dataclass(frozen=True)
class Completion:
    """Greedy continuation of one prompt.

    Args:
        text: The generated text.
        token_ids: The generated tokens.
        logprobs: Log-probability of each generated token given all tokens before it, in nats.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Streamed(Completion):
    """A continuation that arrived piece by piece.

    Args:
        start_s: Time when the request was sent, in seconds on `time.perf_counter`'s clock.
        piece_s: Time when each piece of the answer had arrived, in seconds on the same clock.
    """

    start_s: float
    piece_s: tuple[float, ...]


class VllmServer(Endpoint):
    """A client of a server that this process started.

    Args:
        url: Address of the server.
        pid: Id of the server's process; the processes that it starts belong to its session.
        key_variable: Environment variable with the server's key; None sends none.
        names: Names of the adapters that the server was started with, which requests address them by.
    """

    GREEDY: ClassVar = {**Endpoint.GREEDY, "repetition_penalty": 1.0}
    """The likeliest token at each position, without the repetition penalty that many base models' folders set."""

    def __init__(self, url: str, pid: int, key_variable: str | None = None, *, names: Sequence[str] = ()) -> None:
        super().__init__(url, key_variable, timeout_s=REQUEST_TIMEOUT_S, repeats=False)
        self.pid = pid
        self.names = tuple(names)
        self.asks_for_key = key_variable is not None

    def is_healthy(self) -> bool:
        """Whether the server reports that it is up; a model may still fail at its first request."""
        return bool(self._health())

    def _health(self) -> bool | None:
        """Whether the server says that it is well; None if it does not answer."""
        try:
            with self._connections.send("/health", None, self.headers, HEALTH_TIMEOUT_S) as response:
                return 200 <= response.status < 300
        except NO_ANSWER:
            return None

    def version(self) -> str:
        """Version of vLLM that the server runs."""
        answer = self.request("/version")
        try:
            return str(answer["version"])
        except (LookupError, TypeError) as error:
            raise EngineError(f"{self.url}/version: the answer has no version: {self.beginning(answer)}") from error

    def is_alive(self) -> bool:
        """Whether the process, a child of this one, runs without reporting a failure; a busy server need not answer."""
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        return self._health() is not False

    def wait(self) -> None:
        """Return when the server has ended or reports a failure."""
        while self.is_alive():
            time.sleep(HEALTH_S)

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter while the server runs, which VLLM_ALLOW_RUNTIME_LORA_UPDATING has to allow.

        Raises:
            EngineError: A name that is loaded already, or an adapter that the server refuses.
        """
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.absolute())})

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter while the server runs, which VLLM_ALLOW_RUNTIME_LORA_UPDATING has to allow.

        Raises:
            EngineError: A name that is not loaded.
        """
        self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def _post(self, path: str, body: dict[str, str]) -> None:
        with self._open(path, body, REQUEST_TIMEOUT_S) as response:  # whose answer is no JSON
            response.read()

    def complete(
        self, model: str, prompt: Sequence[int], *, max_tokens: int, timeout_s: float | None = None
    ) -> Completion:
        """Greedy continuation of one token sequence; see `complete_batch`."""
        return self.complete_batch(model, [prompt], max_tokens=max_tokens, timeout_s=timeout_s)[0]

    def complete_batch(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        timeout_s: float | None = None,
    ) -> list[Completion]:
        """Greedy continuations of token sequences, of exactly `max_tokens` tokens each, even beyond an end of text.

        The longest time, in seconds, is that of the client if none is given.

        Raises:
            EngineError: A model that does not exist, or a server that failed or stayed silent.
        """
        body = self._body(model, [list(prompt) for prompt in prompts], max_tokens)
        answer = self.request("/v1/completions", body, timeout_s=timeout_s)
        with self.readable(model, answer):
            return [
                Completion(choice["text"], tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))
                for choice in sorted(answer["choices"], key=lambda choice: choice["index"])
            ]

    def stream(self, model: str, prompt: Sequence[int], *, max_tokens: int, timeout_s: float) -> Streamed:
        """Greedy continuation of one prompt, with the times at which its pieces arrived.

        Args:
            model: Name of an adapter, or of the base model.
            prompt: Token ids.
            max_tokens: Number of tokens to generate, even beyond an end of text.
            timeout_s: Longest silence, in seconds.

        Raises:
            EngineError: A model that does not exist, a server that failed or stayed silent, or an answer of another
                length, model or prompt, or without its logprobs.
        """
        body = self._body(model, list(prompt), max_tokens) | {"stream": True}
        text = ""
        ids: list[int] = []
        logprobs: list[float] = []
        times: list[float] = []
        start = time.perf_counter()
        with self._open("/v1/completions", body, timeout_s) as response:
            for line in _lines(response):
                if not line.startswith(b"data: {"):
                    continue
                now = time.perf_counter()
                try:
                    piece: dict[str, Any] = json.loads(line[6:])
                except (ValueError, RecursionError) as error:
                    found = self.beginning(self.hidden(line[6:].decode(errors="replace"), is_cut=True))
                    raise EngineError(f"{model}: the answer broke off at {found}.") from error
                if "choices" not in piece:
                    found = self.beginning(piece)
                    raise EngineError(f"{model}: the server failed in the middle of an answer: {found}")
                with self.readable(model, piece):
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

    def _body(self, model: str, prompt: list[int] | list[list[int]], max_tokens: int) -> dict[str, Any]:
        asked = {"model": model, "prompt": prompt, "max_tokens": max_tokens, **self.GREEDY}
        return asked | {"ignore_eos": True, "logprobs": 0, "return_token_ids": True}


def _lines(response: HTTPResponse) -> Iterator[bytes]:
    """The lines of an answer as they arrive; the last one may be incomplete."""
    rest = b""
    try:
        while piece := response.read1(PIECE_BYTES):
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
    except IncompleteRead:  # it hung up
        if not rest:
            raise
    if rest:
        yield rest
