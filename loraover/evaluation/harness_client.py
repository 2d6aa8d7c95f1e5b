"""The harness's client for an endpoint, with errors that do not show the key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import ClientError
from lm_eval.models.openai_completions import LocalCompletionsAPI
from requests import RequestException

from loraover.client.endpoint import Endpoint
from loraover.common.errors import EngineError, LoraOverError

FAULTS = (
    ClientError,
    RequestException,
    TimeoutError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
)  # the last five: an answer that is not JSON, or that lacks what was asked for, such as logprobs


class HarnessClient(LocalCompletionsAPI):
    """Client for one server.

    aiohttp's errors show the headers that were sent, and asyncio logs errors of requests that were given up, so each
    error is replaced inside the request.

    Args:
        endpoint: The server.
        options: Options of `LocalCompletionsAPI`.
    """

    def __init__(self, endpoint: Endpoint, **options: Any) -> None:
        headers = endpoint.headers  # else the harness sends any OpenAI key that it finds
        super().__init__(base_url=f"{endpoint.api}/completions", header=headers, **options)
        self._endpoint = endpoint

    async def amodel_call(self, *arguments: Any, **named: Any) -> Any:
        with self._faults_without_key():
            return await super().amodel_call(*arguments, **named)

    def generate_until(self, *arguments: Any, **named: Any) -> Any:
        with self._faults_without_key():
            return super().generate_until(*arguments, **named)

    def loglikelihood(self, *arguments: Any, **named: Any) -> Any:
        with self._faults_without_key():
            return super().loglikelihood(*arguments, **named)

    @contextmanager
    def _faults_without_key(self) -> Iterator[None]:
        try:
            yield
        except LoraOverError:
            raise
        except FAULTS as error:
            fault = self._endpoint.hidden(f"{type(error).__name__}: {error}")
            raise EngineError(f"{self.base_url}: the endpoint gave no usable answer: {fault}") from None
