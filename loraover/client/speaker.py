"""Next tokens with their logprobs, from a server of OpenAI's protocol in the dialect in which it answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraover.client.dialects import DIALECTS, TOPS, Dialect, Prompt, Read, token_id, up_to_unknown
from loraover.client.endpoint import AbsentError, Endpoint, UnfitRequestError
from loraover.common.errors import EngineError

PROBE = "Hello"


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
            self._asked(self.dialect, model, self._probe(self.dialect), 1)
        except (UnfitRequestError, AbsentError):
            return False
        return True

    def _probe(self, dialect: Dialect) -> Prompt:
        return list(self._tokenizer(PROBE).input_ids) if dialect.form == "ids" else PROBE

    def _find(self, model: str) -> Dialect:
        refusals: list[EngineError] = []
        for dialect in (one for one in DIALECTS if one.protocol == "openai"):
            try:
                answer = self._asked(dialect, model, self._probe(dialect), 1)
            except EngineError as error:
                if not refusals and not isinstance(error, UnfitRequestError | AbsentError):
                    raise
                refusals.append(error)
                continue
            if any(answer.tops):
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
        answer = self._asked(self.dialect, model, prompt, tokens)
        with self.endpoint.readable(model, answer._asdict()):
            ids = up_to_unknown(token_id(entry, self._by_text) for entry in answer.tokens)
            return Generated(ids, [self._logprobs(model, pairs) for pairs in answer.tops[:scored]])

    def text_of(self, tokens: Sequence[int]) -> str | None:
        """The text that the tokenizer turns into these tokens; None if there is none."""
        return text_of(self._tokenizer, tokens)

    def _asked(self, dialect: Dialect, model: str, prompt: Prompt, tokens: int) -> Read:
        answer = self.endpoint.request(*dialect.request(model, prompt, tokens))
        with self.endpoint.readable(model, answer):
            return dialect.read(answer)

    def _logprobs(self, model: str, pairs: Sequence[tuple[Any, Any]]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        found = {id_: float(value) for entry, value in pairs if (id_ := token_id(entry, self._by_text)) is not None}
        if not found or not all(math.isfinite(value) for value in found.values()):
            message = f"{model}: the logprobs are not those of the base model's tokens: {pairs!r:.300}"
            raise EngineError(self.endpoint.hidden(message))
        return np.array(list(found), dtype=np.int64), np.array(list(found.values()), dtype=np.float32)

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
