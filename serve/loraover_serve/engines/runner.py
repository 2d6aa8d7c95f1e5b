"""A program for the python of another environment, which holds mlx-lm or OpenVINO GenAI and not this package.

Each line that it reads is a request in JSON, {"method": ..., other arguments}, and each line that it writes is an
answer, {"result": ...} or {"error": ...}. Arrays are handed over as .npy files. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np


class MlxProcess:
    """mlx-lm in float32, with one model in memory at a time.

    Args:
        model: Folder of the base model.
        settings: Entries that mlx-lm needs beside those of the model's `config.json`.
        adapters: Folder of each arm's adapter; None for the base model.
    """

    def __init__(self, model: str, settings: dict[str, Any], adapters: dict[str, str | None]) -> None:
        self._model, self._settings, self._adapters = model, settings, adapters
        self._loaded: dict[str, Any] = {}

    def logits(self, arm: str, tokens: list[int], file: str) -> None:
        """Write the logits after each token to a file."""
        import mlx.core as mx

        np.save(file, np.array(self._arm(arm)(mx.array([tokens]))[0].astype(mx.float32)), allow_pickle=False)

    def greedy(self, arm: str, prompt: list[int], tokens: int) -> list[int]:
        """Generate the likeliest tokens through the cache."""
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        model = self._arm(arm)
        cache, read = make_prompt_cache(model), prompt
        found: list[int] = []
        for _ in range(tokens):
            read = [int(mx.argmax(model(mx.array([read]), cache=cache)[0, -1]))]
            found += read
        return found

    def _arm(self, arm: str) -> Any:
        if arm not in self._loaded:
            from pathlib import Path

            import mlx.core as mx
            from mlx_lm.utils import load_adapters, load_model

            self._loaded.clear()
            model, _ = load_model(Path(self._model), model_config=self._settings)
            if self._adapters[arm] is not None:
                model = load_adapters(model, self._adapters[arm])
            model.set_dtype(mx.float32)
            model.eval()
            self._loaded[arm] = model
        return self._loaded[arm]


class OpenVinoProcess:
    """OpenVINO GenAI in float32, with one pipeline in memory at a time.

    One pipeline for both arms would mix them: release 2026.4.1 caches the keys and values of a prompt, and uses them
    again for a request with another adapter.

    Args:
        model: Folder of the model that optimum-intel exported.
        adapters: File of each arm's adapter; None for the base model.
    """

    def __init__(self, model: str, adapters: dict[str, str | None]) -> None:
        self._model, self._adapters = model, adapters
        self._loaded: dict[str, Any] = {}

    def top(self, arm: str, tokens: list[int], number: int) -> list[tuple[int, float]]:
        """The likeliest next tokens with their logprobs: the scores of as many beams of one token each."""
        beams = {"num_beams": number, "num_return_sequences": number, "length_penalty": 0.0}
        found = self._generate(arm, tokens, max_new_tokens=1, **beams)
        return [(int(ids[0]), float(score)) for ids, score in zip(found.tokens, found.scores, strict=True) if ids]

    def greedy(self, arm: str, prompt: list[int], tokens: int) -> list[int]:
        """Generate the likeliest tokens."""
        return list(map(int, self._generate(arm, prompt, max_new_tokens=tokens).tokens[0]))

    def _generate(self, arm: str, tokens: list[int], **options: Any) -> Any:
        import openvino
        import openvino_genai as genai

        config = genai.GenerationConfig(ignore_eos=True, do_sample=False, **options)
        return self._arm(arm).generate(openvino.Tensor(np.array([tokens], dtype=np.int64)), config)

    def _arm(self, arm: str) -> Any:
        if arm not in self._loaded:
            import openvino_genai as genai

            self._loaded.clear()
            options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
            if self._adapters[arm] is not None:
                options["adapters"] = genai.AdapterConfig(genai.Adapter(self._adapters[arm]))
            self._loaded[arm] = genai.LLMPipeline(self._model, "CPU", **options)
        return self._loaded[arm]


RUNNERS = {"mlx": MlxProcess, "openvino": OpenVinoProcess}
"""Engines by name."""


def main(words: Sequence[str]) -> None:
    """Answer requests to the engine that the first word names, made with the arguments in the second, in JSON."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is for the log
    engine: Any = None
    for line in sys.stdin:
        try:
            if engine is None:
                engine = RUNNERS[words[0]](**json.loads(words[1]))
            request = json.loads(line)
            answer = {"result": getattr(engine, request.pop("method"))(**request)}
        except Exception as error:  # whatever fails in the engine is for the caller to report
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
