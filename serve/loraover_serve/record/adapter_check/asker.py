"""The questions of a reference, asked of a server in the dialect in which it answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

from loraover.client.at_once import COMPANION_TOKENS, at_once, in_company
from loraover.client.dialects import Dialect
from loraover.client.endpoint import Endpoint
from loraover.client.speaker import Generated, Speaker, find_models
from loraover.common.errors import EngineError
from loraover_serve.judge.case import flag
from loraover_serve.judge.evidence import ReadChat
from loraover_serve.judge.limits import ADAPTER, BASE, OTHER
from loraover_serve.record.adapter_check.evidence import AskedOnce, Greedy
from loraover_serve.record.adapter_check.reference import Reference, Row, Rows


class Asker:
    """Asks a server the questions of a reference.

    Args:
        reference: The reference.
        endpoint: The server.
        adapter: Name of the adapter there; None means that of the reference.
        base: Name of the base model there; None finds out.
        protocol: Protocol that the server speaks; None finds out.
        option: Name of an option as its user writes it.

    Attributes:
        chats: Chats whose tokens the server tells; None if prompts are no chats.

    Raises:
        ConfigError, EngineError: See `find_models`.
    """

    def __init__(
        self,
        reference: Reference,
        endpoint: Endpoint,
        adapter: str | None = None,
        base: str | None = None,
        protocol: str | None = None,
        option: Callable[[str], str] = flag,
    ) -> None:
        self.reference, self.endpoint = reference, endpoint
        self._found = find_models(
            endpoint,
            lambda name: Speaker(endpoint, name, partial(_probe, reference), lambda: reference.by_text, protocol),
            adapter=adapter or reference.adapter_name,
            model=reference.base_name,
            base=base,
            named=option,
        )
        self.names = {BASE: self._found.base, ADAPTER: self._found.adapter}
        self.speaker, self.dialect = self._found.speaker, self._found.speaker.dialect
        self.chats: list[ReadChat] | None = [] if self.dialect.form == "chat" else None

    def answer(self, arm: str, place: int, tokens: int) -> Generated:
        """The greedy answer of a model from a place on."""
        name, prompt = self.names[arm], _prompt(self.reference, place, self.dialect)
        found = self.speaker.answer(name, prompt, tokens, scored=tokens, is_base=arm == BASE)
        if self.chats is not None:
            self.chats += ReadChat.of(found.prompt, self.reference.read(place))
        return found

    def rounds(self, arm: str, places: Sequence[int], repeats: int = 1) -> list[AskedOnce]:
        """An arm's logprobs at places, each asked for several times, all of it in random order.

        Those of chats are kept as long as the tokens are PyTorch's.

        Raises:
            UnscoredError: No answer has logprobs.
        """

        def ask(asked: tuple[int, int]) -> tuple[int, Rows, dict[str, str]]:
            turn, place = asked
            question, step = self.reference.places[place]
            expected = self.reference.questions[question]["answer"]
            found = self.answer(arm, place, len(expected) if self.dialect.form == "chat" else 1)
            return turn, self.rows(place, expected[step:], found), found.told

        asked = [(turn, place) for turn in range(repeats) for place in places]
        found: list[tuple[dict[int, Row], dict[int, dict[str, str]]]] = [({}, {}) for _ in range(repeats)]
        for turn, rows, told in at_once(ask, random.sample(asked, len(asked))):
            found[turn][0].update(rows)
            found[turn][1].update(dict.fromkeys(rows, told))
        if not any(rows for rows, _ in found):
            raise self.speaker.without_logprobs(self.names[arm])
        return [AskedOnce(dict(sorted(rows.items())), told) for rows, told in found]

    @staticmethod
    def rows(place: int, expected: Sequence[int], found: Generated) -> dict[int, Row]:
        """Rows of an answer from a place on, as long as its tokens are the expected ones."""
        return {place + step: row for step, row in enumerate(found.along(expected)) if row}

    @cached_property
    def places(self) -> list[int]:
        """Places that the server can be asked for."""
        mine = self.reference
        found = [place for place in range(len(mine.places)) if _prompt(mine, place, self.dialect) is not None]
        if not found:
            raise EngineError(
                f"{self.endpoint.url} takes no token ids, and no text has exactly the tokens of a question."
            )
        return found

    def greedy(self) -> list[Greedy]:
        """The adapter's greedy answer to each question."""

        def ask(question: int) -> Greedy:
            place, expected = self.reference.first(question), self.reference.questions[question]["answer"]
            found = self.answer(ADAPTER, place, len(expected))
            return Greedy(question, found.ids, len(found.tokens), self.rows(place, expected, found))

        return at_once(ask, [q for q, step in map(self.reference.places.__getitem__, self.places) if step == 0])

    def mixed(self, places: Sequence[int]) -> dict[str, Rows]:
        """Rows of each arm while the other one generates, and of the adapter beside another one."""
        found: dict[str, Rows] = {}
        other = self._found.find_other()
        self.names |= {} if other is None else {OTHER: other}
        for name, arm, companion in ((BASE, BASE, ADAPTER), (ADAPTER, ADAPTER, BASE), (OTHER, ADAPTER, OTHER)):
            if companion in self.names:
                with in_company(partial(self.answer, companion, places[0], COMPANION_TOKENS)):
                    found[name] = self.rounds(arm, places)[0].rows
        return found


def _prompt(reference: Reference, place: int, dialect: Dialect) -> Any:
    """A place's tokens in the form that a server takes; None if there is no such form."""
    question, step = reference.places[place]
    mine = reference.questions[question]
    if dialect.form == "chat":
        return mine["message"] if step == 0 else None
    return reference.read(place) if dialect.form == "ids" else mine["texts"][step]


def _probe(reference: Reference, dialect: Dialect) -> Any:
    """The first prompt that has this form; None if there is none."""
    asked = (_prompt(reference, place, dialect) for place in range(len(reference.places)))
    return next((prompt for prompt in asked if prompt is not None), None)
