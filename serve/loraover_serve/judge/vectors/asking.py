"""Requests for the vector, classes or score of a text, in the form that a server takes.

vLLM, Text Embeddings Inference (TEI) and Infinity differ in paths, bodies and answers. Requests to TEI's own paths name
no model, so the base model and the adapter count as one there. Every answer is checked: its numbers are finite, and it
has exactly the entries that were asked for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from loraover.client.at_once import at_once
from loraover.client.endpoint import AbsentError, Endpoint, NotJsonError, UnansweredError, UnfitRequestError
from loraover.client.speaker import find_models
from loraover.common.errors import EngineError, printable
from loraover_serve.judge.case import flag
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.vectors.reference import Vector, VectorQuestion, VectorReference, VectorTask, floats_of

QUICK_TEXTS = 8
"""Number of requests of a quick check."""

ENCODED = 2
"""Number of texts whose vectors are asked for in base64 as well."""

MOST_TIMES = 16
"""Times the recorded number of components above which an answer is refused and not judged."""

LABEL_CHARACTERS = 200
"""Characters of the name of a class that are kept."""

LARGEST = 1e9
"""Absolute value of a number above which an answer counts as damaged."""


class VectorAnswer(NamedTuple):
    """An answer to one text.

    Args:
        numbers: The vector, the number of each class, or the score.
        label: Name of the likeliest class, as the server gives it; None if it gives none.
        names: Names of the classes, as the server gives them; empty if it gives none, or the recorded ones.
    """

    numbers: list[float]
    label: str | None = None
    names: tuple[str, ...] = ()


class VectorForm(NamedTuple):
    """A request that some servers take for one text, and how its answer is read.

    Args:
        path: Path of the request.
        body: Fields of the request, from the name of the model and a text.
        read: Function that reads an answer, given the labels; if it fails, the answer has another form.
        names_model: Whether the request says which model it is for.
        normalises: Whether the request says if vectors get the length 1.
    """

    path: str
    body: Callable[[str, VectorQuestion], dict[str, Any]]
    read: Callable[[Any, Sequence[str]], VectorAnswer]
    names_model: bool = True
    normalises: bool = False


def _only(entries: Any) -> Any:
    """The only entry of a list; if the entry has an index, this must be 0."""
    if not isinstance(entries, list) or len(entries) != 1:
        raise ValueError("expected one entry for one text")
    if isinstance(entries[0], dict) and entries[0].get("index", 0) != 0:
        raise ValueError("expected the entry 0")
    return entries[0]


def checked_numbers(found: Any) -> list[float]:
    """Numbers of an answer, or of its rows in turn.

    Raises:
        ValueError: No number, or one that is not finite or too large.
        TypeError: Another value in place of a number.
    """
    rows = found if found and isinstance(found[0], list) else [found]
    numbers = [value for row in rows for value in row]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in numbers):
        raise TypeError("an entry is not a number")
    if not numbers or not all(math.isfinite(value) and abs(value) < LARGEST for value in numbers):
        raise ValueError("a number is not finite, or too large")
    return [float(value) for value in numbers]


def _of_classes(found: Any, labels: Sequence[str]) -> VectorAnswer:
    """The number of each class, by the names that the server gives or in its order."""
    if isinstance(found, dict):
        return VectorAnswer(checked_numbers(found["probs"]), found.get("label"))
    scores = {str(each["label"]): each["score"] for each in found}
    if scores.keys() != {*labels} or len(found) != len(labels):
        return VectorAnswer(checked_numbers([each["score"] for each in found]), names=tuple(sorted(scores)))
    return VectorAnswer(checked_numbers([scores[label] for label in labels]))


def _input(model: str, asked: VectorQuestion) -> dict[str, Any]:
    return {"model": model, "input": [asked.text]}


LOGITS = {"use_activation": False, "raw_scores": True}
"""Fields that ask vLLM, TEI and Infinity for logits; a server that knows neither field answers probabilities."""

_OPENAI = [
    VectorForm(
        path,
        lambda model, asked: _input(model, asked) | {"encoding_format": "float"},
        lambda found, _: VectorAnswer(checked_numbers(_only(found["data"])["embedding"])),
    )
    for path in ("/v1/embeddings", "/embeddings")
]


def _pooled(task: VectorTask, more: Mapping[str, Any]) -> VectorForm:
    return VectorForm(
        "/pooling",
        lambda model, asked: _input(model, asked) | {"task": task, **more},
        lambda found, _: VectorAnswer(checked_numbers(_only(found["data"])["data"])),
    )


_FORMS: Mapping[VectorTask, Sequence[VectorForm]] = {
    "embed": [
        *_OPENAI,
        VectorForm(
            "/embed",
            lambda _, asked: {"inputs": [asked.text]},
            lambda found, _: VectorAnswer(checked_numbers(_only(found))),
            names_model=False,
            normalises=True,
        ),
        _pooled("embed", {}),
    ],
    "classify": [
        VectorForm(
            "/classify",
            lambda model, asked: _input(model, asked) | LOGITS,
            lambda found, labels: _of_classes(_only(found["data"]), labels),
        ),
        VectorForm(
            "/predict",
            lambda _, asked: {"inputs": asked.text, "raw_scores": True},
            lambda found, labels: _of_classes(found[0] if isinstance(found[0], list) else found, labels),
            names_model=False,
        ),
        _pooled("classify", {"use_activation": False}),
    ],
    "score": [
        VectorForm(
            "/score",
            lambda model, asked: {"model": model, "text_1": asked.text, "text_2": asked.pair, "use_activation": False},
            lambda found, _: VectorAnswer(checked_numbers([_only(found["data"])["score"]])),
        ),
        VectorForm(
            "/rerank",
            lambda model, asked: {"model": model, "query": asked.text, "documents": [asked.pair], **LOGITS},
            lambda found, _: VectorAnswer(checked_numbers([_only(found["results"])["relevance_score"]])),
        ),
        VectorForm(
            "/rerank",
            lambda _, asked: {"query": asked.text, "texts": [asked.pair], "raw_scores": True},
            lambda found, _: VectorAnswer(checked_numbers([_only(found)["score"]])),
            names_model=False,
        ),
    ],
    "token_classify": [_pooled("token_classify", {"use_activation": False})],
}


def _also_below(forms: Sequence[VectorForm]) -> list[VectorForm]:
    """The forms, and then those paths below /v1, where gateways and Infinity's --url-prefix have them."""
    known = {form.path for form in forms}
    below = [form._replace(path=f"/v1{form.path}") for form in forms if not form.path.startswith("/v1/")]
    return [*forms, *(form for form in below if form.path not in known)]


FORMS: Mapping[VectorTask, Sequence[VectorForm]] = {task: _also_below(forms) for task, forms in _FORMS.items()}
"""Forms of requests for each task, in the order in which they are tried."""


@dataclass(frozen=True)
class VectorAnswers:
    """Answers of a server to the texts of a reference, by the index of the text.

    Args:
        path: Path at which the server answers.
        base: Answers of the base model; empty if the server has one model under both names.
        rounds: Answers of the adapter, for each time that the texts were asked, with the headers of each response.
        encoded: Vectors of some texts as numbers, and as base64.
        mixed: Answers of each arm while the other one is asked as well; empty if there are none.
        is_one_model: Whether the server has one model under both names.
        is_here: Whether an engine in this process answered, one request after the other.
    """

    path: str
    base: Mapping[int, VectorAnswer]
    rounds: Sequence[Mapping[int, tuple[VectorAnswer, Mapping[str, str]]]]
    encoded: Sequence[tuple[Vector, Vector]] = field(default=())
    is_one_model: bool = False
    mixed: Mapping[str, Mapping[int, VectorAnswer]] = field(default_factory=dict)
    is_here: bool = False

    @property
    def adapter(self) -> dict[int, VectorAnswer]:
        """Answers of the adapter to the first requests for each text."""
        return {place: said for place, (said, _) in self.rounds[0].items()}

    def every(self) -> Iterator[tuple[str, int, VectorAnswer]]:
        """Arm, text and answer of every request."""
        rounds = [{place: said for place, (said, _) in one.items()} for one in self.rounds]
        for arm, each in [(BASE, self.base), *((ADAPTER, one) for one in rounds), *self.mixed.items()]:
            yield from ((arm, place, said) for place, said in each.items())


class VectorSpeaker:
    """A server, addressed in the form in which it answers.

    Args:
        model: Name of the base model there, which is asked in each form until one works.

    Raises:
        EngineError: A server that answers in none of the forms.
    """

    def __init__(self, endpoint: Endpoint, model: str, reference: VectorReference) -> None:
        self.endpoint, self._reference = endpoint, reference
        self.form = self._find(model)

    def has(self, model: str) -> bool:
        """Whether a model of this name answers."""
        try:
            self.ask(model, 0)
        except (UnfitRequestError, AbsentError):
            return False
        return True

    def ask(self, model: str, place: int) -> tuple[VectorAnswer, dict[str, str]]:
        """Answer of a model to a text, with the headers of the response.

        Raises:
            EngineError: A refusal, or an answer of another model or in another form.
        """
        return self._asked(self.form, model, place)

    def encoded(self, model: str, place: int) -> Vector | None:
        """Vector of a text that is asked for in base64; None if the server has no such form."""
        if self.form not in _OPENAI:
            return None
        body = self._body(self.form, model, place) | {"encoding_format": "base64"}
        with suppress(UnfitRequestError):
            answer = self.endpoint.request(self.form.path, body)
            with self.endpoint.readable(model, answer):
                found = _only(answer["data"])["embedding"]
                if not isinstance(found, str):  # a server that knows no such field
                    return None
                self._check_size(model, len(found) * 3 // 16, place)
                return floats_of(found)
        return None

    def _find(self, model: str) -> VectorForm:
        refusals: list[EngineError] = []
        for form in FORMS[self._reference.task]:
            try:
                self._asked(form, model, 0)
            except EngineError as error:  # also of another model, since TEI names its own
                if _is_silent(error):
                    raise
                refusals.append(error)
            else:
                return form
        told = "; ".join(dict.fromkeys(map(str, refusals)))
        raise EngineError(f"the server answers none of the requests for {WANTED[self._reference.task]}: {told:.700}")

    def _body(self, form: VectorForm, model: str, place: int) -> dict[str, Any]:
        body = form.body(model, self._reference.questions[place])
        return body | {"normalize": self._reference.is_normalised} if form.normalises else body

    def _check_size(self, model: str, numbers: int, place: int) -> None:
        right = len(self._reference.rows[ADAPTER][place])
        if numbers > MOST_TIMES * right:
            raise EngineError(f"{model}: the server answers with {numbers} numbers, expected {right}.")

    def _shown(self, text: object) -> str:
        return printable(self.endpoint.hidden(str(text)))[:LABEL_CHARACTERS]

    def _asked(self, form: VectorForm, model: str, place: int) -> tuple[VectorAnswer, dict[str, str]]:
        answer, told = self.endpoint.exchange(form.path, self._body(form, model, place))
        named = form.names_model and isinstance(answer, dict)
        with self.endpoint.readable(model, answer if isinstance(answer, dict) else {}, is_named=named):
            try:
                said = form.read(answer, self._reference.labels)
            except ValueError as error:
                shown = self.endpoint.beginning(answer)
                raise EngineError(f"{model}: the server's answer cannot be read, since {error}: {shown}") from error
        self._check_size(model, len(said.numbers), place)
        label = None if said.label is None else self._shown(said.label)
        return VectorAnswer(said.numbers, label, tuple(map(self._shown, said.names))), told


def _is_silent(error: EngineError) -> bool:
    """Whether a server answered nothing, or wants to be asked later, so that another path is of no use."""
    if not isinstance(error, UnansweredError) or isinstance(error, NotJsonError):
        return False
    return error.is_limit or not error.is_status


WANTED: Mapping[VectorTask, str] = {
    "embed": "vectors of texts (vLLM: --runner pooling --convert embed)",
    "classify": "classes of texts (vLLM: --runner pooling --convert classify)",
    "score": "scores of pairs (vLLM: --runner pooling --convert classify, of a model with one label)",
    "token_classify": "classes of tokens (vLLM: /pooling)",
}
"""Answers that a task asks for, in words."""


class VectorAsker:
    """Asks a server about the adapter of a reference of vectors.

    Args:
        names: Name of each arm's model there.
    """

    def __init__(self, reference: VectorReference, speaker: VectorSpeaker, names: Mapping[str, str]) -> None:
        self.reference, self.speaker, self.names = reference, speaker, names

    @classmethod
    def of(
        cls,
        reference: VectorReference,
        endpoint: Endpoint,
        adapter: str | None = None,
        base: str | None = None,
        option: Callable[[str], str] = flag,
    ) -> VectorAsker:
        """Speak to a server about the adapter of a reference; the arguments are those of `Asker.of`.

        Raises:
            ConfigError, EngineError: See `find_models`.
        """
        found = find_models(
            endpoint,
            lambda name: VectorSpeaker(endpoint, name, reference),
            adapter=adapter or reference.adapter_name,
            model=reference.base_name,
            base=base,
            named=option,
        )
        return cls(reference, found.speaker, {BASE: found.base, ADAPTER: found.adapter})

    @property
    def is_one_model(self) -> bool:
        """Whether the server has one model under both names."""
        return self.names[BASE] == self.names[ADAPTER] or not self.speaker.form.names_model

    def answers(self, repeats: int, *, without_mixed: bool = False) -> VectorAnswers:
        """Answers of both models; the adapter is asked several times, and then both are asked together.

        Raises:
            EngineError: A server that refuses, or whose answers cannot be read.
        """
        places = range(len(self.reference.questions))
        alone = {} if self.is_one_model else {p: said for p, (said, _) in self._round(BASE, places).items()}
        rounds = [self._round(ADAPTER, places) for _ in range(repeats)]
        pairs = [(rounds[0][p][0].numbers, self.speaker.encoded(self.names[ADAPTER], p)) for p in places[:ENCODED]]
        encoded = [(numbers, found) for numbers, found in pairs if found is not None]
        mixed: dict[str, dict[int, VectorAnswer]] = {}
        if not self.is_one_model and not without_mixed:
            mixed = self._mixed(places)  # last, since its faults may stay in a cache
        return VectorAnswers(self.speaker.form.path, alone, rounds, encoded, self.is_one_model, mixed)

    def _mixed(self, places: Sequence[int]) -> dict[str, dict[int, VectorAnswer]]:
        """Answers of both arms to texts, asked by turns and several at once, so that a server mixes them in batches."""

        def ask(asked: tuple[str, int]) -> tuple[str, int, VectorAnswer]:
            arm, place = asked
            return arm, place, self.speaker.ask(self.names[arm], place)[0]

        found: dict[str, dict[int, VectorAnswer]] = {BASE: {}, ADAPTER: {}}
        for arm, place, said in at_once(ask, [(arm, place) for place in places for arm in (BASE, ADAPTER)]):
            found[arm][place] = said
        return found

    def quick_answers(self) -> VectorAnswers:
        """The adapter's answers to the texts whose vectors it changes most."""
        models = self.reference.models()
        pairs = zip(models.base.rows, models.adapter.rows, strict=True)
        changes = [math.fsum((value - base[i]) ** 2 for i, value in adapter.items()) for base, adapter in pairs]
        chosen = sorted(range(len(changes)), key=lambda place: -changes[place])[:QUICK_TEXTS]
        return VectorAnswers(self.speaker.form.path, {}, [self._round(ADAPTER, chosen)], is_one_model=self.is_one_model)

    def _round(self, arm: str, places: Sequence[int]) -> dict[int, tuple[VectorAnswer, Mapping[str, str]]]:
        """Answers of an arm to texts, which are asked in random order."""

        def ask(place: int) -> tuple[int, VectorAnswer, dict[str, str]]:
            return place, *self.speaker.ask(self.names[arm], place)

        found = at_once(ask, random.sample(places, len(places)))
        return {place: (said, told) for place, said, told in sorted(found, key=lambda each: each[0])}
