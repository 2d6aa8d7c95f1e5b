"""The long questions of a reference, asked of a server one after the other, without and with its cache.

A cold answer is asked for with a salt that no other request has, or without llama-server's cache of prompts, so that
the server reads all of the question. A warm one continues keys and values that earlier requests have left.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple

from loraover.client.dialects import MORE
from loraover.client.speaker import Generated
from loraover.common.errors import ConfigError, EngineError
from loraover_serve.judge.asker import Asker, in_form, rows_along
from loraover_serve.judge.case import flag
from loraover_serve.judge.limits import ADAPTER, BASE, OTHER
from loraover_serve.judge.models import Row, Rows
from loraover_serve.judge.reference import Reference
from loraover_serve.judge.user_command import UserCommand

HITS = "vllm:prefix_cache_hits_total"
"""Prometheus metric of vLLM: number of tokens that it has found in its cache."""

MOST_SLOTS = 64
"""Largest number of llama-server's slots that are filled; with more slots, answers after other prompts are left out."""

OTHERS = 10
"""Largest number of requests for names, metrics and the number of slots."""

FEW = 3
"""Number of questions that are asked of another adapter, whose answers are not recorded."""

ON_OWN = "after its own answers"
WARM = {"cache_prompt": True}  # which llama-server needs; vLLM takes no notice


class Asked(NamedTuple):
    """Answers of a model to the long questions, asked for one after the other.

    Args:
        arm: The model.
        after: Answers that the server gave before, in words.
        rows: Their logprobs.
        cached: Number of tokens that the server found in its cache; None if it does not tell.
    """

    arm: str
    after: str
    rows: Rows
    cached: int | None


class Reloaded(NamedTuple):
    """Reload of the adapter, before which the server has read the long questions.

    Args:
        command: The user's command.
        seconds: Seconds that it took.
        roots: Path of the adapter that the server names before and after it; None if it names none.
        before: Answers of the adapter as it was.
        is_kept: Whether the server still had the base model's keys and values afterwards; None if it does not tell.
    """

    command: str
    seconds: float
    roots: tuple[str | None, str | None]
    before: Asked
    is_kept: bool | None


def long_questions(reference: Reference, option: Callable[[str], str] = flag, field: str = "caches") -> Reference:
    """The long questions of a reference.

    Args:
        option: Function that writes the name of an option as its user does.
        field: Name of the option that needs them.

    Raises:
        ConfigError: The reference has none.
    """
    if reference.caches is None:
        raise ConfigError(
            f"{option(field)}: the reference of {reference.adapter_name} has no long questions, expected some; "
            "record it again: loraover record --long."
        )
    return reference.caches


def takes_salt(asker: Asker) -> bool:
    """Whether a server takes fields by which an answer without a cache can be asked for."""
    dialect = asker.speaker.dialect
    return dialect.protocol == "llama-server" or MORE.keys() <= dialect.more.keys()


class WarmProbe:
    """Requests for long answers, one at a time: a server keeps what it has finished.

    Attributes:
        places: Places of the first tokens of the answers.
        endpoint: The server.
    """

    def __init__(self, asker: Asker) -> None:
        self.endpoint = asker.speaker.endpoint
        self._asker, self._name = asker, secrets.token_hex(8)
        self.places = [place for place in asker.places if asker.models.places[place][1] == 0]

    def reload(self, command: UserCommand) -> Reloaded:
        """Let the server read the long questions, and then load the adapter anew."""
        name = self._asker.names[ADAPTER]
        self._warm(BASE, "")
        before, root = self._warm(ADAPTER, ""), self.endpoint.root(name)
        seconds = command.run(self.endpoint.ends)
        roots = root, self.endpoint.root(name)
        first = self._metric()
        again = self._warm(BASE, "", self.places[:1]).cached
        kept = _rise(first, self._metric()) if again is None else again
        return Reloaded(command.shown, seconds, roots, before, None if kept is None else kept > 0)

    def answers(self) -> tuple[dict[str, Asked], Asked, list[Asked], int | None]:
        """Cold answers, the base model's answers in its own cache, warm answers, and the number of cached tokens."""
        start = self._metric()
        warm = [self._warm(ADAPTER, "after what the server had before")]  # whose keys and values cold answers may evict
        first = self._metric()
        early = _rise(start, first)
        cold = {arm: self.cold(arm) for arm in (ADAPTER, BASE)}
        found = _rise(first, self._metric())
        if found and all(each.cached is None for each in cold.values()):
            cold[BASE] = cold[BASE]._replace(cached=found)
        noise = self.on_own(BASE)
        other = self._asker.names.get(OTHER) or self._asker.find_other()
        self._asker.names |= {} if other is None else {OTHER: other}
        if other is not None:
            cold[OTHER] = self.cold(OTHER, self.places[:FEW])
        before = self._metric()
        warm.append(self._warm(BASE, "after those of the adapter"))
        if other is not None:
            warm.append(self._warm(OTHER, "after those of the adapter and the base model", self.places[:FEW]))
        warm.append(self._warm(ADAPTER, "after those of the base model" + (" and another adapter" if other else "")))
        for arm, after in ((BASE, "the adapter"), (ADAPTER, "the base model")) if self._slots else ():
            self._refill()
            warm.append(self._warm(arm, f"after those of {after}, and other prompts in every slot"))
        told = [each.cached for each in warm if each.cached is not None]
        late = _rise(before, self._metric())
        return cold, noise, warm, sum(told) if told else None if early is None or late is None else early + late

    def on_own(self, arm: str) -> Asked:
        """A model's answers in a cache that holds only what this model has read."""
        own = self._salted("own", arm)
        self._ask(arm, own, "", self.places[:1])
        return self._ask(arm, own, ON_OWN)

    def cold(self, arm: str, places: Sequence[int] | None = None) -> Asked:
        """A model's answers without a cache."""
        found = [
            self._ask(arm, self._salted(arm, place) | {"cache_prompt": False}, "", [place])
            for place in places or self.places
        ]
        told = [each.cached for each in found if each.cached is not None]
        return Asked(
            arm, "", {place: row for each in found for place, row in each.rows.items()}, sum(told) if told else None
        )

    def _warm(self, arm: str, after: str, places: Sequence[int] | None = None) -> Asked:
        return self._ask(arm, WARM, after, places)

    def _salted(self, *words: object) -> dict[str, Any]:
        return {"cache_salt": "-".join(map(str, ("loraover", self._name, *words))), **WARM}

    def _ask(self, arm: str, fields: Mapping[str, Any], after: str, places: Sequence[int] | None = None) -> Asked:
        rows: dict[int, Row] = {}
        told: list[int] = []
        for place in self.places if places is None else places:
            found = self.answer(arm, place, fields)
            rows |= self.along(place, found)
            told += [] if found.cached is None else [found.cached]
        if not rows:
            raise self._asker.speaker.without_logprobs(self._asker.names[arm])
        return Asked(arm, after, rows, sum(told) if told else None)

    def answer(self, arm: str, place: int, fields: Mapping[str, Any] = WARM) -> Generated:
        """The greedy answer of a model to a question.

        Args:
            arm: The model.
            place: Place of the question.
            fields: Fields of the request that choose the cache.
        """
        prompt = in_form(self._asker.models, place, self._asker.speaker.dialect)
        assert prompt is not None
        tokens = len(self._expected(place))
        asked = fields if takes_salt(self._asker) else {}
        return self._asker.speaker.answer(
            self._asker.names[arm], prompt, tokens, scored=tokens, is_base=arm == BASE, more=asked
        )

    def along(self, place: int, found: Generated) -> dict[int, Row]:
        """Rows of an answer, up to the first token that is not the expected one."""
        return rows_along(place, self._expected(place), found)

    def _expected(self, place: int) -> Sequence[int]:
        return self._asker.models.questions[self._asker.models.places[place][0]].answer

    def _refill(self) -> None:
        """Give each of llama-server's slots another prompt, so that it moves the earlier one to its host's memory."""
        for index in range(self._slots + 1):
            prompt = in_form(self._asker.models, self.places[0], self._asker.speaker.dialect)
            assert prompt is not None
            # Another beginning: nothing of it is in the cache.
            other = f"{index} {prompt}" if isinstance(prompt, str) else [*prompt[index + 1 : index + 65]][::-1]
            self._asker.speaker.answer(self._asker.names[BASE], other, 1, is_base=True, more=WARM)

    @property
    def is_complete(self) -> bool:
        """Whether answers after other prompts in every slot were asked for, which llama-server alone needs."""
        return self._asker.speaker.dialect.protocol != "llama-server" or self._slots > 0

    @cached_property
    def _slots(self) -> int:
        """Number of llama-server's slots; 0 for another server."""
        with suppress(EngineError, LookupError, TypeError):
            told = self.endpoint.request("/props")["total_slots"]
            return told if type(told) is int and 0 < told <= MOST_SLOTS else 0
        return 0

    def _metric(self) -> float | None:
        lines = self.endpoint.page("/metrics").splitlines()
        found = [line.rpartition("}")[2].removeprefix(HITS).split()[:1] for line in lines if line.startswith(HITS)]
        with suppress(ValueError):  # behind the value, a line may have the time of its writing
            total = math.fsum(float(value) for each in found for value in each)
            return total if found and math.isfinite(total) else None
        return None


def most_requests(long: Reference) -> int:
    """Largest number of requests by `ask_warm`: cold answers, seven rounds of warm ones, and the slots."""
    return 9 * len(long.questions) + 2 * FEW + 2 * (MOST_SLOTS + 1) + OTHERS


def _rise(before: float | None, after: float | None) -> int | None:
    return None if before is None or after is None else max(0, int(after - before))
