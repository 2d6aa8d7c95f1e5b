"""What servers take, and how they answer: OpenAI's protocol in its forms, SGLang's, TGI's and llama-server's own."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

from loraover_serve.judge.limits import BASE


class Dialect(NamedTuple):
    """What a server takes: its protocol, a prompt as "ids", "text" or "chat", number of logprobs, further fields."""

    protocol: str
    form: str
    top: int
    more: Mapping[str, Any] = {}

    def request(self, name: str, arm: str, prompt: Any, tokens: int) -> tuple[str, dict[str, Any]]:
        """Path and body of a request for the greedy answer to a prompt."""
        if self.protocol == "sglang":
            sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
            body = {
                "input_ids": prompt,
                "sampling_params": sampling,
                "return_logprob": True,
                "top_logprobs_num": self.top,
            }
            return "/generate", body | ({} if arm == BASE else {"lora_path": name})
        if self.protocol == "tgi":
            parameters = {"max_new_tokens": tokens, "details": True, "top_n_tokens": self.top, "do_sample": False}
            return "/generate", {
                "inputs": prompt,
                "parameters": parameters | ({} if arm == BASE else {"adapter_id": name}),
            }
        if self.protocol == "llama-server":
            body = {"prompt": prompt, "n_predict": tokens, "n_probs": self.top, "temperature": 0, "cache_prompt": False}
            index = int(name) if name.isdecimal() else 0
            return "/completion", body | {"lora": [{"id": index, "scale": float(arm != BASE)}]}
        body = {"model": name, "max_tokens": tokens, "temperature": 0, **self.more}
        if self.form == "chat":
            messages = [{"role": "user", "content": prompt}]
            return "/v1/chat/completions", body | {"messages": messages, "logprobs": True, "top_logprobs": self.top}
        return "/v1/completions", body | {"prompt": prompt, "logprobs": self.top}

    def read(self, answer: Any) -> list[tuple[Any, list[tuple[Any, float]]]]:
        """The token and the likeliest tokens with their logprobs at each place of an answer."""
        if self.protocol == "sglang":
            meta = answer["meta_info"]
            chosen = [token for _, token, *_ in meta["output_token_logprobs"]]
            tops = [[(token, value) for value, token, *_ in place] for place in meta["output_top_logprobs"]]
            return list(zip(chosen, tops, strict=True))
        if self.protocol == "tgi":
            found, tops = answer["details"]["tokens"], answer["details"]["top_tokens"]
            return [(one, [(each, each["logprob"]) for each in place]) for one, place in zip(found, tops, strict=True)]
        if self.protocol == "llama-server":
            return [(e, [(o, o["logprob"]) for o in e["top_logprobs"]]) for e in answer["completion_probabilities"]]
        choice = answer["choices"][0]
        given = choice.get("logprobs") or {}
        if given.get("content"):
            return [(e, [(o, o.get("logprob")) for o in e.get("top_logprobs") or [e]]) for e in given["content"]]
        tops = [list((place or {}).items()) for place in given.get("top_logprobs") or []]
        chosen = choice.get("token_ids") or given.get("tokens") or [max(p, key=_value)[0] if p else None for p in tops]
        return list(zip(chosen, tops, strict=False))


def _value(pair: tuple[Any, float]) -> float:
    return pair[1]


MORE = {"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True, "repetition_penalty": 1.0}
"""Fields that only some servers know."""
DIALECTS = [
    *(Dialect("openai", *each) for each in product(("ids", "text", "chat"), (20, 5), (MORE, {}))),
    *(Dialect("sglang", "ids", 20), Dialect("tgi", "text", 5), Dialect("llama-server", "ids", 20)),
]
