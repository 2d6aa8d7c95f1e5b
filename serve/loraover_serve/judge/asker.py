"""The questions, asked of a server in the dialect in which it answers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from statistics import fmean

from loraover.client.at_once import COMPANION_TOKENS, at_once, in_company
from loraover.client.dialects import Dialect, Prompt
from loraover.client.endpoint import Endpoint
from loraover.client.speaker import Generated, Speaker, find_models
from loraover.common.errors import EngineError
from loraover_serve.judge.case import flag
from loraover_serve.judge.limits import ADAPTER, BASE, OTHER
from loraover_serve.judge.models import Answers, AskedOnce, Greedy, Models, ReadChat, Row, Rows
from loraover_serve.judge.own_prompts import OwnPrompts
from loraover_serve.judge.reference import Reference
from loraover_serve.judge.templates import read_template

QUICK = 8  # requests
SCREENED = 16
"""Number of questions that are asked once, to find out on which weights or with which adapter a server answers."""


class Asker:
    """Asks a server.

    Args:
        models: The questions, with the models that the server is compared with.
        speaker: The server.
        names: Name of each arm's model there.
        find_other: Function that returns the name of another adapter there; None if there is none.

    Attributes:
        find_other: Function that returns the name of another adapter there; None if there is none.
        chats: Chats whose tokens the server tells; None if prompts are no chats.
    """

    def __init__(
        self,
        models: Models,
        speaker: Speaker,
        names: Mapping[str, str],
        find_other: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.models, self.speaker, self.names = models, speaker, dict(names)
        self.find_other = find_other
        self.chats: list[ReadChat] | None = [] if speaker.dialect.form == "chat" else None

    @classmethod
    def of(
        cls,
        reference: Reference | OwnPrompts,
        endpoint: Endpoint,
        adapter: str | None = None,
        base: str | None = None,
        protocol: str | None = None,
        option: Callable[[str], str] = flag,
    ) -> Asker:
        """Speak to a server about the adapter of a reference.

        Args:
            adapter: Name of the adapter there; None means that of the reference.
            base: Name of the base model there; None asks the server.
            protocol: Protocol that the server speaks; None tries all.
            option: Name of an option as its user writes it.

        Raises:
            ConfigError, EngineError: See `find_models`.
        """
        places = range(len(reference.places))

        def probe(dialect: Dialect) -> Prompt | None:
            asked = (in_form(reference, place, dialect) for place in places)
            return next((prompt for prompt in asked if prompt is not None), None)

        found = find_models(
            endpoint,
            lambda name: Speaker(endpoint, name, probe, lambda: reference.by_text, protocol),
            adapter=adapter or reference.adapter_name,
            model=reference.base_name,
            base=base,
            named=option,
        )
        return cls(reference, found.speaker, {BASE: found.base, ADAPTER: found.adapter}, found.find_other)

    @property
    def is_one_model(self) -> bool:
        """Whether the server has one model under both names."""
        return self.names[BASE] == self.names[ADAPTER] and self.speaker.dialect.protocol == "openai"

    def answer(self, arm: str, place: int, tokens: int) -> Generated:
        """The greedy answer of a model from a place on."""
        prompt = in_form(self.models, place, self.speaker.dialect)
        assert prompt is not None
        found = self.speaker.answer(self.names[arm], prompt, tokens, scored=tokens, is_base=arm == BASE)
        if self.chats is not None:
            self.chats += ReadChat.of(found.prompt, self.models.read(place))
        return found

    def rounds(self, arm: str, places: Sequence[int], repeats: int = 1) -> list[AskedOnce]:
        """An arm's logprobs at places, each asked for several times. All requests are in random order.

        Of the answers to chats, the logprobs before the first token that is not PyTorch's are kept.

        Raises:
            UnscoredError: No answer has logprobs.
        """

        def ask(asked: tuple[int, int]) -> tuple[int, Rows, dict[str, str]]:
            turn, place = asked
            expected = self._expected(place)
            found = self.answer(arm, place, len(expected) if self.chats is not None else 1)
            return turn, rows_along(place, expected, found), found.told

        asked = [(turn, place) for turn in range(repeats) for place in places]
        found: list[tuple[dict[int, Row], dict[int, dict[str, str]]]] = [({}, {}) for _ in range(repeats)]
        for turn, rows, told in at_once(ask, random.sample(asked, len(asked))):
            found[turn][0].update(rows)
            found[turn][1].update(dict.fromkeys(rows, told))
        if not any(rows for rows, _ in found):
            raise self.speaker.without_logprobs(self.names[arm])
        return [AskedOnce(dict(sorted(rows.items())), told) for rows, told in found]

    def _expected(self, place: int) -> Sequence[int]:
        """Tokens of PyTorch's answer from a place on."""
        question, step = self.models.places[place]
        return self.models.questions[question].answer[step:]

    @cached_property
    def places(self) -> list[int]:
        """Places of answers that the server can be asked for.

        Raises:
            EngineError: There are none.
        """
        steps = enumerate(step for _, step in self.models.places)
        asked = (place for place, step in steps if step >= 0)
        found = [place for place in asked if in_form(self.models, place, self.speaker.dialect) is not None]
        if not found:
            raise EngineError(
                f"{self.speaker.endpoint.url} takes no token ids, and no text has exactly the tokens of a prompt; give "
                "other prompts, or start the server so that it takes token ids."
            )
        return found

    def answers(
        self, repeats: int | None = None, *, without_mixed: bool = False, without_template: bool = False
    ) -> Answers:
        """Answers to everything that the judge needs.

        Args:
            repeats: Number of times that each question is asked of the adapter; None asks once, and does not keep the
                answers as a round.
            without_mixed: Whether no requests for both models are sent together.
            without_template: Whether no chats are sent that show the server's chat template.

        Raises:
            EngineError: A server that refuses, or whose answers cannot be read.
        """
        base = {} if self.is_one_model else self.rounds(BASE, self.places)[0].rows
        rounds = self.rounds(ADAPTER, self.places, repeats or 1)
        greedy, mixed, failure = self._greedy(), dict[str, Rows](), None
        if not self.is_one_model and not without_mixed:
            try:
                mixed = self._mixed()  # last, since its faults may stay in a cache
            except EngineError as error:  # what was answered before is judged all the same
                failure = str(error)
        template = None
        if not without_template and self.chats is None:  # else the questions themselves are chats
            template = read_template(self.speaker.endpoint, self.names[ADAPTER], self.models.conversations)
        return Answers(
            base,
            rounds[0].rows,
            greedy,
            mixed,
            () if repeats is None else rounds,
            self.is_one_model,
            failure,
            without_mixed and not self.is_one_model,
            self.speaker.responses,
            self.chats,
            template,
            without_template and self.chats is None and bool(self.models.conversations.found),
        )

    def quick_answers(self) -> Answers:
        """The adapter's answers to some questions, each at the place where the adapter changes the logprobs most."""
        pairs = zip(self.models.base.rows, self.models.adapter.rows, strict=True)
        changes = [max(abs(value - base[i]) for i, value in adapter.items()) for base, adapter in pairs]
        places = sorted(self.places, key=lambda place: -changes[place])
        first = {self.models.places[place][0]: place for place in reversed(places)}
        chosen = sorted(first.values(), key=lambda place: -changes[place])[:QUICK]
        rounds = self.rounds(ADAPTER, chosen)
        return Answers({}, rounds[0].rows, rounds=rounds, responses=self.speaker.responses)

    def _greedy(self) -> list[Greedy]:
        def ask(place: int) -> Greedy:
            expected = self._expected(place)
            found = self.answer(ADAPTER, place, len(expected))
            rows = rows_along(place, expected, found)
            return Greedy(self.models.places[place][0], found.ids, len(found.tokens), rows)

        return at_once(ask, [place for place in self.places if self.models.places[place][1] == 0])

    def _mixed(self) -> dict[str, Rows]:
        """Rows of each arm while the other one generates, and of the adapter beside another adapter."""
        found: dict[str, Rows] = {}
        other = self.find_other()
        self.names |= {} if other is None else {OTHER: other}
        longest = max(len(question.tokens) for question in self.models.questions)
        prompt, tokens = in_form(self.models, self.places[0], self.speaker.dialect), min(COMPANION_TOKENS, longest - 1)
        assert prompt is not None
        first = prompt if isinstance(prompt, str) else prompt[:1]

        def accompany(arm: str) -> None:
            """Ask a model for a short answer, which the server's largest length allows."""
            self.speaker.answer(self.names[arm], first, max(tokens, 1), is_base=arm == BASE)

        for name, arm, companion in ((BASE, BASE, ADAPTER), (ADAPTER, ADAPTER, BASE), (OTHER, ADAPTER, OTHER)):
            if companion in self.names:
                with in_company(partial(accompany, companion)):
                    found[name] = self.rounds(arm, self.places)[0].rows
        return found


def in_form(models: Models, place: int, dialect: Dialect) -> Prompt | None:
    """A place's tokens in the form that a server takes; None if there is no such form."""
    if dialect.form == "chat":
        question, step = models.places[place]
        return models.questions[question].message if step == 0 else None
    if dialect.form == "ids" and (ids := models.read(place)):
        return ids
    return models.text(place) if dialect.form == "text" or dialect.protocol == "llama-server" else None


def rows_along(place: int, expected: Sequence[int], found: Generated) -> dict[int, Row]:
    """Rows of an answer from a place on, up to the first token that is not the expected one."""
    return {place + step: row for step, row in enumerate(found.along(expected)) if row}


def on_served_weights(asker: Asker) -> Asker:
    """Ask a server's base model, and return an asker whose reference has the weights that its answers fit best.

    Nothing is asked of a server if its reference has one base alone. If none of the bases fits, the nearest is judged,
    and found to be another one.

    Raises:
        EngineError: A server that refuses, or whose answers cannot be read.
    """
    known = asker.models
    if not isinstance(known, Reference) or not known.other_bases:
        return asker
    arm = ADAPTER if asker.is_one_model else BASE
    answers = screened(asker, arm)
    distances = [screened_distance(known.on_other(index), arm, answers) for index in range(known.other_bases)]
    if min(distances) >= screened_distance(known, arm, answers):
        return asker
    nearest = known.on_other(distances.index(min(distances)))
    return Asker(nearest, asker.speaker, asker.names, asker.find_other)


def screened(asker: Asker, arm: str) -> dict[tuple[int, ...], Row]:
    """The next tokens that a server's model gives at the first SCREENED questions, by the tokens that it reads."""
    models = asker.models
    places = [place for place in asker.places if models.places[place][1] == 0][:SCREENED]
    return {tuple(models.read(place)): row for place, row in asker.rounds(arm, places)[0].rows.items()}


def screened_distance(models: Models, arm: str, answers: Mapping[tuple[int, ...], Row], least: int = 1) -> float:
    """RMS distance of answers from those of a right model, in nats; infinite if fewer than `least` have its questions.

    Args:
        answers: A server's answers, as `screened` gives them.
    """
    model, squares = models.adapter if arm == ADAPTER else models.base, []
    for place, (_, step) in enumerate(models.places):
        row = answers.get(tuple(models.read(place))) if step == 0 else None
        if row is not None:
            squares.append(fmean(off * off for off in model.off(place, row)))
    return math.sqrt(fmean(squares)) if len(squares) >= least else math.inf
