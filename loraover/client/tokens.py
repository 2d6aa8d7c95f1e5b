"""Requests in tokens to a vLLM server: completions at once, or piece by piece."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPResponse, IncompleteRead
from typing import Any, ClassVar

from loraover.client.endpoint import Endpoint
from loraover.common.errors import EngineError

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


class TokenEndpoint(Endpoint):
    """A vLLM server, which takes token ids and returns them."""

    GREEDY: ClassVar = {**Endpoint.GREEDY, "repetition_penalty": 1.0}
    """The likeliest token at each position, without the repetition penalty that many base models' folders set."""

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

        Args:
            model: Name of an adapter, or of the base model.
            prompts: Token ids of each prompt.
            max_tokens: Number of tokens to generate.
            timeout_s: Longest time, in seconds; None means that of the client.

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
