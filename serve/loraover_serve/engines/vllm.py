"""vLLM over its OpenAI-compatible streaming interface; one server has all arms loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from loraover.common.errors import EngineError
from loraover_serve.engines.base import Engine
from loraover_serve.engines.sample import Request, Sample
from loraover_serve.vllm.server import VllmServer


class VllmEngine(Engine):
    """A running vLLM server.

    Args:
        server: client of the server.
        models: name of each arm's model on the server.
        timeout_s: longest silence in the middle of an answer, in seconds.
    """

    name = "vllm"

    def __init__(self, server: VllmServer, models: Mapping[str, str], timeout_s: float) -> None:
        self.arms = tuple(models)
        self.server, self.models = server, dict(models)
        self._timeout_s = timeout_s

    def run(self, arm: str, block: int, first: int, requests: Sequence[Request]) -> list[Sample]:
        return self.run_each([arm] * len(requests), arm, block, first, requests)

    def run_each(
        self, models: Sequence[str], arm: str, block: int, first: int, requests: Sequence[Request]
    ) -> list[Sample]:
        """Answer requests at the same time, each with the model of an arm of its own.

        Args:
            models: name of the arm whose model answers each request.
            arm: name that the samples get.
            block: number of the block.
            first: index of the first request.
            requests: the prompts and lengths.

        Raises:
            EngineError: a request that failed, or that got no answer in time.
        """

        def answer(model: str, index: int, request: Request) -> Sample:
            done = self.server.stream(
                self.models[model], request.prompt, max_tokens=request.new_tokens, timeout_s=self._timeout_s
            )
            if len(done.piece_s) == 1:
                raise EngineError(
                    f"{arm}: an answer of {request.new_tokens} tokens arrived in one piece, so the time per token is "
                    "unknown; ask for more new tokens."
                )
            return Sample(arm, block, index, done.start_s, done.piece_s, done.token_ids, done.logprobs)

        pool = ThreadPoolExecutor(len(requests))
        try:
            return list(pool.map(answer, models, range(first, first + len(requests)), requests))
        finally:  # after a failure or Ctrl-C the other requests may hang until the server ends
            pool.shutdown(wait=False, cancel_futures=True)
