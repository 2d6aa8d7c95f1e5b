"""A server, addressed in the dialect in which it answers and by the names that it has for its models.

This module and those that it imports need the standard library alone, and are packed into the checker of
`loraover record`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import count, takewhile
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from loraover.client.dialects import DIALECTS, TOPS, Dialect, Prompt, Read, token_id, up_to_unknown
from loraover.client.endpoint import HEADER_CHARACTERS, AbsentError, Endpoint, UnfitRequestError, is_same_model
from loraover.common.errors import ConfigError, EngineError, UnscoredError, printable

OF_SERVER = ("id", "system_fingerprint")
"""Fields of an answer that say who gave it."""

ID_BITS, LARGEST_NATS = 64, 1e6
"""Sizes of an id and of a logprob above which an answer is taken for a damaged one."""


class Generated(NamedTuple):
    """A greedy answer, place by place.

    Args:
        tokens: Id of each token; None for one that the server does not identify.
        tops: Logprobs in nats of the likeliest tokens, by their ids.
        told: Headers of the response by their names in small letters, and the fields OF_SERVER.
        prompt: See `Read`.
        cached: See `Read`.
    """

    tokens: list[int | None]
    tops: list[dict[int, float]]
    told: dict[str, str]
    prompt: Sequence[int] | int | None = None
    cached: int | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of the tokens up to the first one that the server does not identify."""
        return up_to_unknown(self.tokens)

    def along(self, expected: Sequence[int]) -> list[dict[int, float]]:
        """Logprobs at each place up to the first token that differs from the expected one, which is included."""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self.tokens, expected[:-1], strict=False))
        return self.tops[: len(list(same)) + 1]


class Response(NamedTuple):
    """An answer whose logprobs were asked for.

    Args:
        model: Name of the model that was asked.
        question: Prompt and number of tokens that were asked for.
        told: See `Generated`.
        is_scored: Whether it has logprobs.
    """

    model: str
    question: Hashable
    told: Mapping[str, str]
    is_scored: bool


class Speaker:
    """A server, addressed in the dialect in which it answers.

    Args:
        model: Name of the base model there, which is asked in one dialect after the other.
        probe: A prompt in the form of a dialect; None if there is none in this form.
        by_text: Function that returns the ids of the tokens whose text no other token has, by the text.
        protocol: Protocol of the server; None tries all.

    Attributes:
        responses: Every answer whose logprobs were asked for, but for the first ones, which find the dialect.

    Raises:
        EngineError: A server that answers in none of the dialects.
        UnscoredError: A server that answers without logprobs.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        probe: Callable[[Dialect], Prompt | None],
        by_text: Callable[[], Mapping[str, int]],
        protocol: str | None = "openai",
    ) -> None:
        self.endpoint, self._probe, self._find_texts = endpoint, probe, by_text
        self.responses: list[Response] = []
        self._name, self._turns = secrets.token_hex(8), dict[Hashable, Iterator[int]]()
        self.dialect = self._find(model, protocol)

    def has(self, model: str) -> bool:
        """Whether a model of this name answers."""
        prompt = self._probe(self.dialect)
        assert prompt is not None
        try:
            self._asked(self.dialect, model, prompt, 1)
        except (UnfitRequestError, AbsentError):
            return False
        return True

    def _find(self, model: str, protocol: str | None) -> Dialect:
        refusals: list[EngineError] = []
        for dialect in (one for one in DIALECTS if protocol in (None, one.protocol)):
            prompt = self._probe(dialect)
            if prompt is None:
                continue
            try:
                answer, _ = self._asked(dialect, model, prompt, 1, is_base=True)
            except EngineError as error:
                if not refusals and not isinstance(error, UnfitRequestError | AbsentError):
                    raise
                refusals.append(error)
                continue
            if any(answer.tops):
                return dialect
            refusals.insert(0, self.without_logprobs(model))
        no_form = f"{self.endpoint.url}: the server accepts none of the forms in which the questions can be sent."
        raise refusals[0] if refusals else EngineError(no_form)

    @staticmethod
    def without_logprobs(model: str) -> UnscoredError:
        """The error of a server that answers without logprobs."""
        return UnscoredError(
            f"{model}: the server returns no logprobs, which the comparison needs; start it so that /v1/completions "
            f"accepts logprobs={TOPS[0]}."
        )

    def answer(
        self,
        model: str,
        prompt: Prompt,
        tokens: int,
        *,
        scored: int = 0,
        is_base: bool = False,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> Generated:
        """The greedy answer of a model to a prompt in the form that the dialect takes.

        Args:
            model: Name of the model on the server.
            prompt: Token ids or text.
            tokens: Number of tokens to generate; a server may end an answer before.
            scored: Number of the first places whose logprobs are read.
            is_base: Whether it is the base model.
            more: Further fields of the request.

        Raises:
            EngineError: A refusal, or an answer of another model or in another form.
        """
        dialect = self.dialect._replace(more={**self.dialect.more, **more})
        answer, told = self._asked(dialect, model, prompt, tokens, is_base=is_base)
        with self.endpoint.readable(model, answer._asdict()):
            known = [token_id(entry, self._by_text) for entry in answer.tokens]
            tops = [self._logprobs(pairs) for pairs in answer.tops[:scored]]
            found = Generated(known, tops, told, answer.prompt, answer.cached)
        if scored:
            self.responses.append(Response(model, _question(prompt, tokens), told, any(answer.tops)))
        return found

    def _asked(
        self, dialect: Dialect, model: str, prompt: Prompt, tokens: int, *, is_base: bool = False
    ) -> tuple[Read, dict[str, str]]:
        turn = next(self._turns.setdefault((model, _question(prompt, tokens)), count()))
        nonce = f"loraover-{self._name}-{turn}"  # few for all questions, since gateways keep lists of users
        answer, told = self.endpoint.exchange(*dialect.request(model, prompt, tokens, is_base=is_base, nonce=nonce))
        with self.endpoint.readable(model, answer, is_named=dialect.protocol == "openai"):
            said = {name: self.endpoint.hidden(str(answer[name])) for name in OF_SERVER if answer.get(name)}
            told |= {name: printable(value[:HEADER_CHARACTERS]) for name, value in said.items()}
            return dialect.read(answer), told

    def _logprobs(self, pairs: list[tuple[Any, Any]]) -> dict[int, float]:
        found = {id_: float(value) for entry, value in pairs if (id_ := token_id(entry, self._by_text)) is not None}
        if not all(abs(value) < LARGEST_NATS and id_.bit_length() < ID_BITS for id_, value in found.items()):
            raise ValueError("not a token and a logprob")
        return found

    @cached_property
    def _by_text(self) -> Mapping[str, int]:
        return self._find_texts()


class Spoken(Protocol):
    """A server that can be asked whether it has a model."""

    def has(self, model: str) -> bool:
        """Whether a model of this name answers."""


AnySpeaker = TypeVar("AnySpeaker", bound=Spoken)


class ServerNames(NamedTuple, Generic[AnySpeaker]):
    """A server, and the names of models there."""

    speaker: AnySpeaker
    base: str
    adapter: str
    listed: Mapping[str, str | None]

    def find_other(self) -> str | None:
        """Name of an adapter that answers and is not the tested one; None if the server has no other."""
        told = [name for name, parent in self.listed.items() if parent is not None] or list(self.listed)
        others = [name for name in told if not any(is_same_model(name, known) for known in (self.base, self.adapter))]
        with suppress(EngineError):
            return others[0] if others and self.speaker.has(others[0]) else None
        return None


def _question(prompt: Prompt, tokens: int) -> Hashable:
    return prompt if isinstance(prompt, str) else tuple(prompt), tokens


def find_models(
    endpoint: Endpoint,
    speak: Callable[[str], AnySpeaker],
    *,
    adapter: str,
    model: str,
    base: str | None = None,
    named: Callable[[str], str],
) -> ServerNames[AnySpeaker]:
    """Speak to a server, and find the names of the models there.

    Args:
        speak: Makes the speaker, given the name of the base model there.
        adapter: Name of the adapter there; some servers load one that they do not list when it is first asked for.
        model: The base model's own name.
        base: Its name there; None finds out.
        named: Name of an option as its user writes it.

    Raises:
        ConfigError: The server has no models of these names.
        EngineError: See `Speaker`.
    """
    listed = endpoint.models()
    if not base:  # as listed, or the only other name; with one name in all, the adapter's
        alike = [each for each in listed if is_same_model(each, model)]
        others = [each for each, parent in listed.items() if parent is None and not is_same_model(each, adapter)]
        alone = next((found[0] for found in (alike, others) if len(found) == 1), model)
        base = model if model in listed else adapter if list(listed) == [adapter] else alone
    names = (base, adapter)
    absent = [name for name in names if listed and name not in listed]
    served = endpoint.hidden(f"{endpoint.api} serves {printable(', '.join(listed))}, and not {', '.join(absent)}")
    unlisted = ConfigError(
        f"{served}; name the adapter with {named('served_name')} and its base model with {named('base_name')}."
    )
    if names[0] in absent:
        raise unlisted
    speaker = speak(names[0])
    if absent and not speaker.has(adapter):
        raise unlisted
    return ServerNames(speaker, *names, listed)
