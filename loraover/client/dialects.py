"""Next tokens with their logprobs, from servers that differ in what they take and in how they name tokens.

A server may take token ids, a text alone, or chats alone; allow 20 logprobs or 5; refuse fields that it does not know;
and name tokens by their ids or by their texts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraover.client.endpoint import AbsentError, Endpoint, UnfitRequestError
from loraover.client.tokens import TokenEndpoint
from loraover.common.errors import EngineError

MORE = {"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True, **TokenEndpoint.GREEDY}
TOPS = (
    20,
    5,
)  # logprobs of a token: the most that vLLM gives unless told otherwise, and that OpenAI's completions give
PROBE = "Hello"
_NUMBERED = re.compile(r"token_id:(\d+)")

Prompt = Sequence[int] | str
"""Token ids, or a text: the text to continue, or the user's message of a chat."""


@dataclass(frozen=True)
class Dialect:
    """What a server takes.

    Args:
        is_chat: Whether a prompt is a message of a chat.
        takes_ids: Whether a prompt is a list of token ids.
        top: Number of logprobs that are asked for at each token.
        more: Fields that only some servers know.
    """

    is_chat: bool
    takes_ids: bool
    top: int
    more: Mapping[str, Any]

    def request(self, model: str, prompt: Prompt, tokens: int) -> tuple[str, dict[str, Any]]:
        """Path and body of a request for the greedy answer to a prompt."""
        body = {"model": model, "max_tokens": tokens, **Endpoint.GREEDY, **self.more}
        if self.is_chat:
            asked = {"messages": [{"role": "user", "content": prompt}], "logprobs": True, "top_logprobs": self.top}
            return "/v1/chat/completions", body | asked
        return "/v1/completions", body | {"prompt": prompt, "logprobs": self.top}


_FORMS = ((False, True), (False, False), (True, False))  # token ids, texts, chats
DIALECTS = [Dialect(chat, ids, top, more) for (chat, ids), top, more in product(_FORMS, TOPS, (MORE, {}))]
"""The dialects, the most exact first."""


@dataclass(frozen=True)
class Generated:
    """The tokens of a greedy answer.

    Args:
        ids: Token ids, up to the first that the server does not identify.
        tops: Ids of the likeliest tokens, and their logprobs in nats, at the first places of the answer.
    """

    ids: tuple[int, ...]
    tops: list[tuple[NDArray[np.int64], NDArray[np.float32]]]


class Speaker:
    """A server, addressed in the dialect in which it answers.

    Args:
        endpoint: The server.
        tokenizer: Tokenizer of the base model.
        model: Name of a model on the server, which is asked in one dialect after the other.

    Raises:
        EngineError: A server that answers in none of the dialects, or without logprobs.
    """

    def __init__(self, endpoint: Endpoint, tokenizer: Any, model: str) -> None:
        self.endpoint, self._tokenizer = endpoint, tokenizer
        self.dialect = self._find(model)

    def has(self, model: str) -> bool:
        """Whether a model of this name answers."""
        try:
            self._choice(self.dialect, model, self._probe(self.dialect), 1)
        except (UnfitRequestError, AbsentError):
            return False
        return True

    def _probe(self, dialect: Dialect) -> Prompt:
        return list(self._tokenizer(PROBE).input_ids) if dialect.takes_ids else PROBE

    def _find(self, model: str) -> Dialect:
        refusals: list[EngineError] = []
        for dialect in DIALECTS:
            try:
                choice = self._choice(dialect, model, self._probe(dialect), 1)
            except EngineError as error:
                if not refusals and not isinstance(error, UnfitRequestError | AbsentError):
                    raise
                refusals.append(error)
                continue
            with self.endpoint.readable(model, choice):
                if any(_tops(choice)):
                    return dialect
            refusals.insert(0, self.without_logprobs(model))
        raise refusals[0]

    @staticmethod
    def without_logprobs(model: str) -> EngineError:
        """The error of a server that answers without logprobs."""
        return EngineError(
            f"{model}: the server gives no logprobs; start it so that /v1/completions answers logprobs={TOPS[0]}, or "
            "verify with an engine that runs here (--engine)."
        )

    def answer(self, model: str, prompt: Prompt, tokens: int, *, scored: int = 0) -> Generated:
        """The greedy answer of a model to a prompt in the form that the dialect takes.

        Args:
            model: Name of the model on the server.
            prompt: Token ids or text.
            tokens: Number of tokens to generate; a server may end an answer before.
            scored: Number of the first places whose logprobs are read.

        Raises:
            EngineError: A refusal, or an answer of another model or in another form.
        """
        choice = self._choice(self.dialect, model, prompt, tokens)
        with self.endpoint.readable(model, choice):
            return Generated(self._ids(choice), [self._logprobs(model, pairs) for pairs in _tops(choice)[:scored]])

    def text_of(self, tokens: Sequence[int]) -> str | None:
        """The text that the tokenizer turns into these tokens; None if there is none."""
        return text_of(self._tokenizer, tokens)

    def _choice(self, dialect: Dialect, model: str, prompt: Prompt, tokens: int) -> dict[str, Any]:
        answer = self.endpoint.request(*dialect.request(model, prompt, tokens))
        with self.endpoint.readable(model, answer):
            return dict(answer["choices"][0])

    def _logprobs(self, model: str, pairs: Sequence[tuple[Any, Any]]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        found = {id_: float(value) for entry, value in pairs if (id_ := self._token_id(entry)) is not None}
        if not found or not all(math.isfinite(value) for value in found.values()):
            message = f"{model}: the logprobs are not those of the base model's tokens: {pairs!r:.300}"
            raise EngineError(self.endpoint.hidden(message))
        return np.array(list(found), dtype=np.int64), np.array(list(found.values()), dtype=np.float32)

    def _ids(self, choice: Mapping[str, Any]) -> tuple[int, ...]:
        if choice.get("token_ids"):
            return tuple(map(int, choice["token_ids"]))
        given = choice.get("logprobs") or {}
        found: list[int] = []
        likeliest = [max(place, key=place.__getitem__) for place in given.get("top_logprobs") or [] if place]
        for entry in given.get("content") or given.get("tokens") or likeliest:
            index = self._token_id(entry)
            if index is None:
                break
            found.append(index)
        return tuple(found)

    def _token_id(self, entry: Any) -> int | None:
        """Id of a token that a server names by its id or its text; None if several tokens have that text."""
        if isinstance(entry, Mapping):
            if isinstance(entry.get("id"), int):
                return int(entry["id"])
            entry = entry.get("token")
        numbered = _NUMBERED.fullmatch(str(entry))
        return int(numbered[1]) if numbered else self._by_text.get(str(entry))

    @cached_property
    def _by_text(self) -> dict[str, int]:
        texts: dict[str, set[int]] = {}
        for index in range(len(self._tokenizer)):
            piece = str(self._tokenizer.convert_ids_to_tokens(index))
            for text in {self._tokenizer.decode([index]), piece, piece.replace("▁", " ")}:  # as sentencepiece has it
                texts.setdefault(text, set()).add(index)
        return {text: next(iter(ids)) for text, ids in texts.items() if len(ids) == 1}


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str | None:
    """The text that a tokenizer turns into these tokens; None if there is none."""
    for skips in (True, False):  # special tokens, such as that at the beginning, which servers add
        text = str(tokenizer.decode(list(tokens), skip_special_tokens=skips))
        if text and tokenizer(text).input_ids == list(tokens):
            return text
    return None


def _tops(choice: Mapping[str, Any]) -> list[list[tuple[Any, Any]]]:
    """The likeliest tokens at each place of an answer, with their logprobs, in either of the forms that servers use."""
    given = choice.get("logprobs") or {}
    if given.get("content"):
        return [
            [(entry, entry.get("logprob")) for entry in place.get("top_logprobs") or [place]]
            for place in given["content"]
        ]
    return [list((place or {}).items()) for place in given.get("top_logprobs") or []]
