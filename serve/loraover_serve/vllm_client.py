"""Requests to a vLLM server: completions, and adapters loaded and unloaded while it runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from loraover.errors import EngineError

REQUEST_TIMEOUT_S = 600.0


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


class VllmClient:
    """One server, by its address."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._opener = build_opener(ProxyHandler({}))  # a proxy for the outside world cannot reach loopback

    def is_healthy(self) -> bool:
        """Whether the server answers at all; a model may still fail at its first request."""
        try:
            return bool(self._opener.open(f"{self.url}/health", timeout=10).status == 200)
        except OSError:
            return False

    def models(self) -> list[str]:
        """Names that requests can address: the base model and the adapters loaded now."""
        return [model["id"] for model in self._request("/v1/models")["data"]]

    def complete(self, model: str, prompt: Sequence[int], *, max_tokens: int) -> Completion:
        """`complete_batch` of one prompt."""
        return self.complete_batch(model, [prompt], max_tokens=max_tokens)[0]

    def complete_batch(self, model: str, prompts: Sequence[Sequence[int]], *, max_tokens: int) -> list[Completion]:
        """Greedy continuations of token sequences, of exactly `max_tokens` tokens each, end of text or not.

        Raises:
            EngineError: no such model, or the engine failed.
        """
        body = {
            "model": model,
            "prompt": [list(prompt) for prompt in prompts],
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
        }
        choices = sorted(self._request("/v1/completions", body)["choices"], key=lambda choice: choice["index"])
        return [
            Completion(choice["text"], tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))
            for choice in choices
        ]

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

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=REQUEST_TIMEOUT_S) as response:
                content = response.read()
        except HTTPError as error:
            text = error.read().decode(errors="replace")
            raise EngineError(f"{path}: the server answered {error.code}: {text[:1000]}") from error
        except (OSError, HTTPException) as error:
            raise EngineError(f"{path}: no answer from {self.url}: {error}") from error
        try:
            return json.loads(content)
        except ValueError:
            return content.decode(errors="replace")
