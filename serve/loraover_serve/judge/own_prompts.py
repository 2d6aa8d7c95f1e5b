"""The user's own prompts, without a reference: a server's answers are compared with one another alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import final

from loraover_serve.judge.models import FaultyModel, Model, Models, Question

OF_TEXTS = 2**40
"""Id of the first token that a server names by its text; the texts are numbered as they appear."""


class Numbered(dict[str, int]):
    """Ids of texts; a text gets its id when it is first looked up."""

    def get(self, text: str, default: object = None) -> int:
        return self.setdefault(text, OF_TEXTS + len(self))


@final
class OwnPrompts(Models):
    """Prompts of the user's, after each of which one token is compared.

    Args:
        texts: The prompts.
        adapter_name: Name of the adapter on the server.
        base_name: Name of the base model there.

    Attributes:
        sensitivity: Ratio of the adapter's noise to the base model's on the server; at least 1.
        by_text: Ids of the tokens that a server names by their texts.
    """

    def __init__(self, texts: Sequence[str], adapter_name: str, base_name: str) -> None:
        self.adapter_name, self.base_name, self.by_text = adapter_name, base_name, Numbered()
        self.questions = [Question((), (0,), text, [text]) for text in texts]
        self.places = [(index, 0) for index in range(len(texts))]
        self.base = self.adapter = Model((), ())
        self.sensitivity, self.vocabulary, self.ends, self.factors = 1.0, 0, frozenset(), ()

    def text(self, place: int) -> str | None:
        return self.questions[place].message

    def rounding(self, number_format: str) -> float:
        return 0.0

    def bias(self, number_format: str) -> float:
        return 1.0

    def scaled(self, factor: float, questions: int | None = None) -> Model:
        return self.adapter

    def adapter_faults(self) -> Iterable[FaultyModel]:
        return ()

    def base_faults(self) -> Iterable[FaultyModel]:
        return ()

    def with_coarse_caches(self) -> Iterable[Model]:
        return ()
