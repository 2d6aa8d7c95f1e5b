"""Servers that answer as a reference has it, without any model: as trained, as the base model, or not at all."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from loraover_serve.judge.models import Model
from loraover_serve.judge.reference import Reference

from support.openai_server import Answer

RIGHT, AS_BASE, REFUSED = "right", "as base", "refused"
VERDICT = {RIGHT: "as trained", AS_BASE: "differs", REFUSED: "failed"}
NOISE, TOP = 2e-4, 20


class FromReference:
    """Answers completions of token ids with logprobs; after the first token of a question it answers the question.

    Args:
        reference: The reference.
        state: What the server does with an adapter, by its name.
        noise: Standard deviation of each logprob, in nats.
        served: The adapted model; None for that of the reference.
    """

    def __init__(
        self, reference: Reference, state: Callable[[str], str], noise: float = NOISE, served: Model | None = None
    ) -> None:
        self._reference, self._state, self._draw = reference, state, random.Random(0)
        self._noise, self._served = noise, served or reference.adapter
        read = [tuple(reference.read(place)) for place in range(len(reference.places))]
        begun = {tokens[:1]: place for place, tokens in reversed([*enumerate(read)])}
        self._places = begun | {tokens: place for place, tokens in enumerate(read)}

    def __call__(self, body: dict[str, Any]) -> int | bytes:
        prompt, name = body.get("prompt"), body["model"]
        state = RIGHT if name == "base" else self._state(name)
        if state == REFUSED:
            return 401
        place = self._places.get(tuple(prompt)) if isinstance(prompt, list) else None
        if place is None:
            return 400
        model = self._reference.base if name == "base" or state == AS_BASE else self._served
        last = [at for at, (q, _) in enumerate(self._reference.places) if q == self._reference.places[place][0]][-1]
        tops = [self._top(model.rows[at]) for at in range(place, min(place + body["max_tokens"], last + 1))]
        tokens = [next(iter(top)) for top in tops]
        choice = {"index": 0, "text": "", "logprobs": {"tokens": tokens, "top_logprobs": tops}}
        return json.dumps({"choices": [choice]}).encode()

    def _top(self, row: dict[int, float]) -> dict[str, float]:
        likeliest = sorted(row, key=row.__getitem__, reverse=True)[:TOP]
        return {f"token_id:{i}": row[i] + self._draw.gauss(0, self._noise) for i in likeliest}


class Chatting:
    """A server that answers as another one does, and renders chats in a template of its own."""

    TELLS = ("ids", "tokenize", "apply", "number", "number, strictly", "nothing", "no route")

    def __init__(self, served: Callable[[dict[str, Any]], int | bytes], tokenizer: Any, tells: str) -> None:
        self._served, self._tokenizer, self._tells = served, tokenizer, tells

    def __call__(self, body: dict[str, Any]) -> int | bytes:
        if "messages" in body:
            found = self._chat(body)
        elif "content" in body:
            found = {"tokens": self._ids(body["content"])} if self._tells == "apply" else 400
        elif "tokens" in body and self._tells in ("ids", "tokenize"):
            found = {"prompt": self._tokenizer.decode(body["tokens"])}
        else:
            return self._served(body)
        return found if isinstance(found, int) else json.dumps(found).encode()

    def _chat(self, body: dict[str, Any]) -> int | dict[str, Any]:
        text = self._tokenizer.apply_chat_template(
            body["messages"], tools=body.get("tools"), tokenize=False, add_generation_prompt=True
        )
        ids = self._ids(text)
        if "max_tokens" not in body:
            of_vllm = "add_generation_prompt" in body
            told = {"tokenize": {"tokens": ids}, "apply": {"prompt": text}}
            return told[self._tells] if self._tells in told and of_vllm == (self._tells == "tokenize") else 404
        if self._tells == "no route" or (self._tells == "number, strictly" and "return_token_ids" in body):
            return 404 if self._tells == "no route" else 422
        numbers = {"usage": {"prompt_tokens": len(ids)}} if "number" in self._tells else {}
        answer = {"choices": [{"index": 0, "message": {"content": "a"}}]} | numbers
        return answer | ({"prompt_token_ids": ids} if self._tells == "ids" else {})

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)


class Fleet:
    """Servers behind one address, which answer by chance; a header names each, and another one each request."""

    def __init__(self, servers: Sequence[Callable[[dict[str, Any]], int | bytes]]) -> None:
        self._servers, self._draw = servers, random.Random(1)

    def __call__(self, body: dict[str, Any]) -> int | Answer:
        index = self._draw.randrange(len(self._servers))
        content = self._servers[index](body)
        headers = {"X-Served-By": f"pod-{index}", "X-Request-Id": f"{self._draw.getrandbits(64):x}", "Via": "1.1 gate"}
        return content if isinstance(content, int) else Answer(content, headers)
