"""onnxruntime-genai in this process; each arm is a graph with a merged adapter, or a graph and a separate adapter."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
from numpy.typing import NDArray

from loraover_serve.engines.base import Engine, engine_errors
from loraover_serve.engines.sample import Request, Sample


@dataclass(frozen=True)
class OnnxArm:
    """A graph, and the adapter to run it with.

    Args:
        graph: folder of the graph.
        adapter: `.onnx_adapter` file; None if the graph needs no adapter.
        session: number of the session. Arms with the same graph and number share a session, and so the place of its
            weights in memory, which changes speed by some percent.
    """

    graph: Path
    adapter: Path | None = None
    session: int = 0


class OnnxEngine(Engine):
    """ONNX Runtime with one session for each graph and session number.

    Args:
        name: "onnx merged" or "onnx swappable".
        arms: graph and adapter of each arm, by the arm's name.

    Raises:
        EngineError: a graph or an adapter that cannot be loaded.
    """

    def __init__(self, name: str, arms: Mapping[str, OnnxArm]) -> None:
        self.name, self.arms = name, tuple(arms)
        self._models: dict[str, Any] = {}
        self._adapters: dict[str, Any] = {}
        with engine_errors(name):
            self._load(arms)

    def _load(self, arms: Mapping[str, OnnxArm]) -> None:
        models: dict[tuple[Path, int], Any] = {}
        for arm, spec in arms.items():
            key = (spec.graph, spec.session)
            if key not in models:
                models[key] = _endless(spec.graph)
            self._models[arm] = models[key]
            if spec.adapter is not None:
                self._adapters[arm] = og.Adapters(self._models[arm])
                self._adapters[arm].load(str(spec.adapter), arm)

    def run(self, arm: str, block: int, first: int, requests: Sequence[Request]) -> list[Sample]:
        with engine_errors(self.name):
            return [self._answer(arm, block, first + i, request) for i, request in enumerate(requests)]

    def logits(self, arm: str, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Return an arm's logits after each of the tokens, of shape (tokens, vocabulary)."""
        with engine_errors(self.name):
            generator = self._generator(arm, len(tokens) + 1)
            generator.append_tokens(np.array(tokens, dtype=np.int64))
            return np.array(generator.get_output("logits")[0], dtype=np.float32)

    def greedy(self, arm: str, prompt: Sequence[int], tokens: int) -> tuple[int, ...]:
        """Return an arm's greedy answer, of exactly so many tokens, among which any token of the vocabulary may be."""
        with engine_errors(self.name):
            generator = self._generator(arm, len(prompt) + tokens)
            appended, found = list(prompt), []
            for _ in range(tokens):
                generator.append_tokens(np.array(appended, dtype=np.int64))
                appended = [int(np.argmax(generator.get_logits()[0, -1]))]
                found += appended
            return tuple(found)

    def _generator(self, arm: str, length: int) -> Any:
        parameters = og.GeneratorParams(self._models[arm])
        parameters.set_search_options(min_length=length, max_length=length, do_sample=False, repetition_penalty=1.0)
        generator = og.Generator(self._models[arm], parameters)
        if arm in self._adapters:
            generator.set_active_adapter(self._adapters[arm], arm)
        return generator

    def _answer(self, arm: str, block: int, index: int, request: Request) -> Sample:
        generator = self._generator(arm, len(request.prompt) + request.new_tokens)
        prompt = np.array(request.prompt, dtype=np.int64)
        times: list[float] = []
        start = time.perf_counter()
        generator.append_tokens(prompt)
        before = time.perf_counter()
        logits = generator.get_logits()[0, -1].astype(np.float64)
        start += time.perf_counter() - before  # reading logits is not part of answering
        while not generator.is_done():
            generator.generate_next_token()
            times.append(time.perf_counter())
        ids = tuple(int(token) for token in generator.get_sequence(0)[len(prompt) :])
        logits -= np.max(logits)
        logprob = float(logits[ids[0]] - np.log(np.sum(np.exp(logits))))
        return Sample(arm, block, index, start, tuple(times), ids, (logprob,))


def _endless(graph: Path) -> Any:
    """Load a model whose end-of-text token is the last one of its vocabulary.

    `min_length` forbids the end-of-text token instead of ignoring it, which would change the answer.
    """
    vocabulary = json.loads((graph / "genai_config.json").read_text())["model"]["vocab_size"]
    config = og.Config(str(graph))
    config.overlay(json.dumps({"model": {"eos_token_id": vocabulary - 1}}))
    return og.Model(config)
