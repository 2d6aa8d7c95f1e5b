"""Requests and answers of language models' servers: OpenAI's protocol, and those of SGLang, TGI and llama-server.

A server may take token ids, a text alone, or chats alone; allow 20 logprobs or 5; refuse fields that it does not know;
and name tokens by their ids or by their texts. This module imports the standard library alone, and is packed into the
checker of `loraover record`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from operator import itemgetter
from typing import Any, NamedTuple

NUMBERED = re.compile(r"token_id:(\d+)")
MARKS = {"\u2581": " ", "\u0120": " ", "\u010a": "\n"}
"""Characters that stand for spaces and ends of lines in vocabularies."""

Prompt = Sequence[int] | str
"""Token ids, or a text: the text to continue, or the user's message of a chat."""


class Read(NamedTuple):
    """An answer, place by place.

    Args:
        tokens: Name of the token at each place: an id, a text, or an object with either.
        tops: Names of the likeliest tokens at each place, and their logprobs.
        prompt: Ids of the tokens of the prompt, or their number; None if the server gives neither.
        cached: Number of the prompt's tokens whose keys and values the server had kept; None if it does not tell.
    """

    tokens: list[Any]
    tops: list[list[tuple[Any, Any]]]
    prompt: Sequence[int] | int | None = None
    cached: int | None = None


class Dialect(NamedTuple):
    """Requests that a server takes.

    Args:
        protocol: Name of its protocol.
        form: Form of a prompt: "ids" of tokens, "text", or the message of a "chat".
        top: Number of logprobs that are asked for at each token.
        more: Fields that only some servers know.
    """

    protocol: str
    form: str
    top: int
    more: Mapping[str, Any] = {}

    def request(
        self, model: str, prompt: Prompt, tokens: int, *, is_base: bool = False, nonce: str = ""
    ) -> tuple[str, dict[str, Any]]:
        """Path and body of a request for the greedy answer to a prompt.

        Args:
            model: Name of the model on the server; for llama-server, the index of its adapter.
            tokens: Number of tokens to generate; a server may end an answer before.
            is_base: Whether the base model is asked for, which some protocols name by leaving out the adapter.
            nonce: Text that no earlier request had, for a server that takes NONCE.
        """
        asked: dict[str, Any]
        if self.protocol == "sglang":
            sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
            asked = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
            return "/generate", asked | {"top_logprobs_num": self.top} | ({} if is_base else {"lora_path": model})
        if self.protocol == "tgi":
            asked = {"max_new_tokens": tokens, "details": True, "top_n_tokens": self.top, "do_sample": False}
            return "/generate", {"inputs": prompt, "parameters": asked | ({} if is_base else {"adapter_id": model})}
        if self.protocol == "llama-server":
            lora = [{"id": int(model) if model.isdecimal() else 0, "scale": float(not is_base)}]
            asked = {"prompt": prompt, "n_predict": tokens, "n_probs": self.top, "lora": lora}
            return "/completion", asked | {"temperature": 0, "cache_prompt": False, **self.more}
        body = {"model": model, "max_tokens": tokens, **GREEDY, **self.more}
        body |= {NONCE: nonce} if NONCE in self.more else {}
        if self.form == "chat":
            asked = {"messages": [{"role": "user", "content": prompt}], "logprobs": True, "top_logprobs": self.top}
            return "/v1/chat/completions", body | asked
        return "/v1/completions", {"prompt": prompt, "logprobs": self.top} | body

    def read(self, answer: Any) -> Read:
        """Return the contents of an answer; one in another form raises any error of a lookup or of a type."""
        if self.protocol == "sglang":
            meta = answer["meta_info"]
            tops = [[(token, value) for value, token, *_ in place] for place in meta["output_top_logprobs"]]
            return Read([token for _, token, *_ in meta["output_token_logprobs"]], tops)
        if self.protocol == "tgi":
            found = answer["details"]
            return Read(found["tokens"], [[(each, each["logprob"]) for each in place] for place in found["top_tokens"]])
        if self.protocol == "llama-server":
            places = answer["completion_probabilities"]
            tops = [[(each, each["logprob"]) for each in place["top_logprobs"]] for place in places]
            return Read(places, tops, cached=cached_tokens(answer, "timings", "cache_n"))
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        prompt = answer.get("prompt_token_ids") or usage.get("prompt_tokens")
        cached = cached_tokens(usage, "prompt_tokens_details", "cached_tokens")
        ids, given = choice.get("token_ids"), choice.get("logprobs") or {}
        if ids and not all(isinstance(each, int) for each in ids):
            raise TypeError("token_ids holds something else")
        if given.get("content"):
            content = given["content"]
            tops = [[(each, each.get("logprob")) for each in e.get("top_logprobs") or [e]] for e in content]
            if self.more == MLX:
                content = [max(place, key=itemgetter(1))[0] for place in tops]
            return Read(ids or content, tops, prompt, cached)
        tops = [list((place or {}).items()) for place in given.get("top_logprobs") or []]
        likeliest = [max(place, key=itemgetter(1))[0] if place else None for place in tops]
        return Read(ids or given.get("tokens") or likeliest, tops, prompt, cached)


def token_id(entry: Any, by_text: Mapping[str, int]) -> int | None:
    """Return the id of the token that a server names, by an id, a text, or an object with either; None if unknown.

    `by_text` has only those tokens whose text no other token has.
    """
    if isinstance(entry, Mapping):
        entry = entry["id"] if isinstance(entry.get("id"), int) else entry.get("token")
    if entry is None or isinstance(entry, int):
        return entry
    text = str(entry)
    if numbered := NUMBERED.fullmatch(text):
        return int(numbered[1])
    return by_text.get(text, by_text.get("".join(MARKS.get(character, character) for character in text)))


def alone_with_text(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Ids of the tokens whose text no other token has, by these texts, from pairs of a text and an id."""
    found: dict[str, set[int]] = {}
    for text, index in pairs:
        found.setdefault(text, set()).add(index)
    return {text: ids.pop() for text, ids in found.items() if len(ids) == 1}


def up_to_unknown(ids: Iterable[int | None]) -> tuple[int, ...]:
    """The ids before the first token that could not be identified."""
    known = []
    for index in ids:
        if index is None:
            break
        known.append(index)
    return tuple(known)


GREEDY = {"temperature": 0}
"""Fields that ask for the likeliest token at each position."""

NONCE = "user"
"""Field that changes no answer, but makes a request new to a cache of responses.

vLLM's `cache_salt` would keep a check from the keys and values in the server's cache, which users' requests meet."""

MORE = {
    "ignore_eos": True,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "repetition_penalty": 1.0,
    NONCE: "",
}
"""Fields that only some servers know."""

TOPS = (20, 5, 1)
"""Logprobs of a token: the most that vLLM gives unless told otherwise, that OpenAI's completions give, and one."""

MLX = {"logprobs": True, "top_logprobs": 10}
"""Fields of completions that mlx_lm.server takes. The token that 0.32 names at a place need not be the chosen one."""

DIALECTS = [
    *(Dialect("openai", *each) for each in product(("ids", "text"), TOPS, (MORE, {}))),
    Dialect("openai", "text", MLX["top_logprobs"], MLX),
    *(Dialect("openai", "chat", *each) for each in product(TOPS, (MORE, {}))),
    *(Dialect("sglang", "ids", TOPS[0]), Dialect("tgi", "text", TOPS[1]), Dialect("llama-server", "ids", TOPS[0])),
]
"""The dialects, the most exact first."""


def cached_tokens(answer: Any, part: str, name: str) -> int | None:
    """Number of tokens from a cache that a part of an answer names; None if it names none: few servers do."""
    told = answer.get(part) if isinstance(answer, dict) else None
    found = told.get(name) if isinstance(told, dict) else None
    return found if type(found) is int and found >= 0 else None
