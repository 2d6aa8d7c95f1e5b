"""Servers that keep keys and values of prompts: rightly, by the name of a model alone, or by the tokens alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from support.verified import Served

Key = Callable[["CachingServer", str], object]
BY_WEIGHTS: Key = lambda server, name: (name, server.versions[name])  # noqa: E731
BY_NAME: Key = lambda server, name: name  # noqa: E731
BY_TOKENS: Key = lambda server, name: None  # noqa: E731


class CachingServer(Served):
    """Answers completions as vLLM does, on blocks of keys and values that it keeps.

    Args:
        base: Folder of the base model.
        adapters: Folder of an adapter, or None for the base model, by the name that requests use.
        key: What keys and values are kept by, beside the tokens.
        block: Number of tokens of a block; only full ones are kept.
        noise: Standard deviation in nats by which an answer with other kept blocks is off.
        fields: Fields of a request that it heeds.
        tells: Whether an answer has the number of tokens that were kept.
    """

    def __init__(
        self,
        base: Path,
        adapters: Mapping[str, Path | None],
        key: Key = BY_WEIGHTS,
        *,
        block: int = 128,
        noise: float = 0.0,
        fields: Sequence[str] = ("cache_salt",),
        tells: bool = True,
        form: str = "ids",
    ) -> None:
        super().__init__(base, adapters, form)
        self._base, self._key, self._block, self._noise, self._fields = base, key, block, noise, fields
        self.versions: dict[str, int] = dict.fromkeys(adapters, 0)
        self._tells, self._loaded = tells, dict[Path, Any]()
        self._kept: list[tuple[object, list[int], Any]] = []
        self.hits = 0

    def load(self, name: str, folder: Path) -> None:
        """Load other weights under a name, as the same path with other files does."""
        if folder not in self._loaded:
            self._loaded[folder] = self._load(self._base, folder)
        self._models[name] = self._loaded[folder]
        self.versions[name] += 1

    def metrics(self) -> str:
        return (
            f'# TYPE vllm:prefix_cache_hits_total counter\nvllm:prefix_cache_hits_total{{engine="0"}} {self.hits}.0\n'
        )

    def _find(self, key: object, ids: list[int]) -> tuple[int, Any]:
        """Number of tokens that are kept, and their keys and values."""
        found: tuple[int, Any] = (0, None)
        for mine, tokens, cache in self._kept:
            same = next((i for i, pair in enumerate(zip(tokens, ids[:-1], strict=False)) if pair[0] != pair[1]), None)
            length = min(len(tokens), len(ids) - 1) if same is None else same
            length -= length % self._block
            if mine == key and length > found[0]:
                found = length, cache
        return found

    @torch.inference_mode()
    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, name = self.prompt(body), body["model"]
        key = body.get("cache_salt") if "cache_salt" in self._fields else None, self._key(self, name)
        hit, kept = self._find(key, ids)
        return self._continued(body, ids, hit, kept, lambda cache: self._kept.append((key, list(ids), cache)))

    def _continued(
        self, body: dict[str, Any], ids: list[int], hit: int, kept: Any, keep: Callable[[Any], object]
    ) -> dict[str, Any]:
        model, cache = self._models[body["model"]], self._cache() if kept is None else copy.deepcopy(kept)
        if (more := cache.get_seq_length() - hit) > 0:
            cache.crop(-more)
        self.hits += hit
        prompt, tops, now = len(ids), [], ids[hit:]
        for step in range(body["max_tokens"]):
            logits = model(torch.tensor([now]), past_key_values=cache, use_cache=True).logits[0, -1]
            if not step:
                keep(copy.deepcopy(cache))
            for seed in (
                hash((body["model"], hit)),
                hash((body["model"], hit, tuple(ids))),
            ):  # of the blocks, and of all
                draw = torch.Generator().manual_seed(seed % 2**31)
                logits = logits + self._noise * torch.randn(len(logits), generator=draw)
            logprobs = logits.log_softmax(-1)
            tops.append(logprobs.topk(body["logprobs"]))
            now = [int(logprobs.argmax())]
            ids = [*ids, *now]
        usage = {"prompt_tokens": prompt, "prompt_tokens_details": {"cached_tokens": hit} if self._tells else None}
        choice = {"index": 0, "text": "", "logprobs": self._logprobs(tops)}
        return {"model": body["model"], "choices": [choice], "usage": usage}


class LlamaServer(CachingServer):
    """Answers as llama-server with one slot does, which moves a prompt to its host's memory when another one comes.

    A slot that held another model's prompt is read anew. What comes back from the host's memory is found by its tokens,
    unless `is_right`.
    """

    def __init__(self, base: Path, adapter: Path, *, is_right: bool) -> None:
        key = BY_WEIGHTS if is_right else BY_TOKENS
        super().__init__(base, {"base": None, "shop": adapter}, key, block=1, form="content")
        self._slot: tuple[str, list[int], Any] | None = None

    @torch.inference_mode()
    def __call__(self, body: dict[str, Any]) -> int | bytes:
        if "lora" not in body:
            return 404
        name = "shop" if body["lora"][0]["scale"] else "base"
        asked = {"model": name, "prompt": body["prompt"], "max_tokens": body["n_predict"], "logprobs": body["n_probs"]}
        ids, (hit, kept) = list(body["prompt"]), (0, None)
        slot = self._slot
        if slot is not None and slot[1][:256] != ids[:256]:
            self._kept.append((self._key(self, slot[0]), slot[1], slot[2]))
            self._slot = slot = None
        if body["cache_prompt"]:
            hit, kept = self._find(self._key(self, name), ids) if slot is None else (0, None)
            if slot is not None and slot[0] == name:
                hit, kept = self._of_slot(slot, ids)

        def keep(cache: Any) -> None:
            self._slot = name, ids, cache

        found = self._continued(asked, ids, hit, kept, keep)
        places = found["choices"][0]["logprobs"]["content"]
        return json.dumps({"completion_probabilities": places, "timings": {"cache_n": hit}}).encode()

    def _of_slot(self, slot: tuple[str, list[int], Any], ids: list[int]) -> tuple[int, Any]:
        kept, self._kept = self._kept, [(None, slot[1], slot[2])]
        found, self._kept = self._find(None, ids), kept
        return found
