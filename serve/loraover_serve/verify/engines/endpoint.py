"""Servers that speak OpenAI's protocol: after each token of a prompt, one new token with its logprobs is asked for.

Logprobs of a prompt (`prompt_logprobs`) are never used: they can miss what an adapter adds to the output head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from threading import Event
from typing import Any, TypeVar, final

import numpy as np

from loraover.common.errors import ConfigError, EngineError
from loraover.evaluation.endpoint import Endpoint, UnfitRequestError
from loraover.models.load import load_tokenizer
from loraover_serve.verify.answers import ADAPTER, BASE, Question, Row
from loraover_serve.verify.engines.base import Setting, VerifyEngine

AT_ONCE = 4  # requests in flight
COMPANIONS, COMPANION_TOKENS = 2, 16  # answers of the other arm that are generated meanwhile, to mix batches
TOP = 20  # logprobs of each token: the most that vLLM gives unless it is started with --max-logprobs
NO_PENALTY = {"repetition_penalty": 1.0}  # many base models' folders set another, which vLLM takes for its default
_NUMBERED = re.compile(r"token_id:(\d+)")
Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


class OpenAiEngine(VerifyEngine):
    """A running server.

    Args:
        url: address of the server.
        names: name of each arm's model on the server.
        tokenizer: the base model's tokenizer, for servers that name tokens by their texts.
        key_variable: environment variable with the server's key; None sends none.
        timeout_s: longest silence, in seconds.
    """

    def __init__(
        self, url: str, names: Mapping[str, str], tokenizer: Any, key_variable: str | None, timeout_s: float
    ) -> None:
        self.endpoint = Endpoint(url, key_variable, timeout_s=timeout_s)
        self.names = dict(names)
        self._tokenizer = tokenizer

    def rows(self, arm: str, questions: Sequence[Question]) -> list[Row]:
        return _at_once(lambda place: self._row(arm, questions, *place), _places(questions))

    def mixed(self, questions: Sequence[Question]) -> dict[str, list[Row]] | None:
        found = {}
        for arm, other in ((BASE, ADAPTER), (ADAPTER, BASE)):
            with self._company(other, questions):
                found[arm] = self.rows(arm, questions)
        return found

    @contextmanager
    def _company(self, arm: str, questions: Sequence[Question]) -> Iterator[None]:
        """Keep an arm generating, in one short answer after the other, so that others share its batches.

        The block begins when each companion has had an answer: the first one of an arm can take a server long. Answers
        are short, since a server sends nothing before an answer is complete, and may be given up as silent meanwhile.
        """
        longest = max(len(question.tokens) for question in questions)  # of which the server certainly takes as many
        prompt, tokens = questions[0].prompt[:1], max(min(COMPANION_TOKENS, longest - 1), 1)
        enough, begun = Event(), [Event() for _ in range(COMPANIONS)]

        def generate(mine: Event) -> None:
            try:
                while not enough.is_set():
                    self._complete(arm, prompt, tokens)
                    mine.set()
            finally:
                mine.set()

        pool = ThreadPoolExecutor(COMPANIONS)
        try:
            running = [pool.submit(generate, mine) for mine in begun]
            for mine in begun:
                mine.wait()
            yield
            enough.set()
            for each in running:
                each.result()
        finally:
            enough.set()
            pool.shutdown(wait=False)

    def _row(self, arm: str, questions: Sequence[Question], index: int, position: int) -> Row:
        choice = self._complete(arm, questions[index].tokens[: position + 1], 1)
        found = self._first_logprobs(arm, choice)
        with self._readable(arm, choice):  # an id may have more digits than any integer type
            ids, values = np.array(list(found), dtype=np.int64), np.array(list(found.values()), dtype=np.float32)
        return Row(index, position, values, ids)

    def greedy(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        def ask(prompt: Sequence[int]) -> tuple[int, ...]:
            choice = self._complete(arm, prompt, tokens)
            with self._readable(arm, choice):
                return self._token_ids(choice)

        return _at_once(ask, prompts)

    def _complete(self, arm: str, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        """The first choice of a greedy completion; the fields that only some servers know are left out if refused."""
        name = self.names[arm]
        plain = {"model": name, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "logprobs": TOP}
        more = {"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True}
        try:
            answer = self.endpoint.post("/completions", plain | more | NO_PENALTY)
        except UnfitRequestError:
            answer = self.endpoint.post("/completions", plain)
        try:
            choice = dict(answer["choices"][0])
            speaker = answer.get("model")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise self._error(f"{name}: the server's answer holds no completion: {answer!r:.300}") from error
        if speaker not in (None, name):
            raise self._error(f"{name} was asked, and {speaker!r} answered; is the adapter loaded under that name?")
        return choice

    def _first_logprobs(self, arm: str, choice: Mapping[str, Any]) -> dict[int, float]:
        """Logprobs of the first token of an answer, by token id, in either of the two forms that servers use."""
        with self._readable(arm, choice):
            pairs = self._pairs(choice)
            found = {id_: float(value) for entry, value in pairs if (id_ := self._token_id(entry)) is not None}
        if not pairs:
            raise EngineError(
                f"{self.names[arm]}: the server gives no logprobs; start it so that /v1/completions answers "
                f"logprobs={TOP}, or verify with an engine that runs here (--engine)."
            )
        if not found or not all(math.isfinite(value) for value in found.values()):
            raise self._error(
                f"{self.names[arm]}: the logprobs are not those of the base model's tokens: {pairs!r:.300}"
            )
        return found

    @contextmanager
    def _readable(self, arm: str, choice: Mapping[str, Any]) -> Iterator[None]:
        """Turn the errors of an answer that has another form into one that shows it."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise self._error(f"{self.names[arm]}: the server's answer cannot be read: {choice!r:.300}") from error

    def _error(self, message: str) -> EngineError:
        """An error about an answer, which may repeat the key."""
        return EngineError(self.endpoint.hidden(message))

    @staticmethod
    def _pairs(choice: Mapping[str, Any]) -> list[tuple[Any, Any]]:
        """The likeliest first tokens of an answer, each with its logprob."""
        given = choice.get("logprobs") or {}
        if given.get("content"):
            first = given["content"][0]
            return [(entry, entry.get("logprob")) for entry in first.get("top_logprobs") or [first]]
        tops = given.get("top_logprobs") or [{}]
        return list((tops[0] or {}).items())

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
            for text in (self._tokenizer.decode([index]), self._tokenizer.convert_ids_to_tokens(index)):
                texts.setdefault(str(text), set()).add(index)
        return {text: next(iter(ids)) for text, ids in texts.items() if len(ids) == 1}

    def _token_ids(self, choice: Mapping[str, Any]) -> tuple[int, ...]:
        """Ids of an answer's tokens, up to the first that the server does not identify."""
        if choice.get("token_ids"):
            return tuple(map(int, choice["token_ids"]))
        given = choice.get("logprobs") or {}
        found: list[int] = []
        for entry in given.get("content") or given.get("tokens") or []:
            index = self._token_id(entry)
            if index is None:
                break
            found.append(index)
        return tuple(found)


@final
class EndpointEngine(OpenAiEngine):
    """A server that somebody else has started, with the adapter loaded."""

    @classmethod
    def install(cls, vllm: str) -> str | None:
        return None

    @classmethod
    @contextmanager
    def start(cls, setting: Setting) -> Iterator[VerifyEngine]:
        assert setting.endpoint is not None
        assert setting.served_name is not None
        names = {BASE: setting.base_name or setting.base.name, ADAPTER: setting.served_name}
        tokenizer = load_tokenizer(setting.base)
        engine = cls(setting.endpoint, names, tokenizer, setting.key_variable, setting.timeout_s)
        listed = engine.endpoint.models()
        others = [name for name in listed if name != setting.served_name]
        if setting.base_name is None and listed and setting.base.name not in listed and len(others) == 1:
            engine.names[BASE] = others[0]
        absent = [name for name in engine.names.values() if listed and name not in listed]
        if absent:
            served = engine.endpoint.hidden(", ".join(listed))
            raise ConfigError(
                f"{engine.endpoint.url} serves {served}, and not {', '.join(absent)}; name the adapter with "
                "--served-name and its base model with --base-name."
            )
        try:
            yield engine
        finally:
            engine.endpoint.close()


def _places(questions: Sequence[Question]) -> list[tuple[int, int]]:
    return [(index, position) for index, question in enumerate(questions) for position in question.answered]


def _at_once(ask: Callable[[Asked], Answered], items: Sequence[Asked]) -> list[Answered]:
    """Ask several questions at a time, and none of those that wait after a failure."""
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        return list(pool.map(ask, items))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
