"""Port of the judge: questions, an engine's answers, and the answers of right and faulty models.

A reference has the recorded logprobs of these models. PyTorch computes them when the judge first asks for a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from loraover_serve.judge.templates import Conversations, TemplateReading

if TYPE_CHECKING:
    from loraover.client.speaker import Response

Row = dict[int, float]
"""Logprobs in nats by token id."""
Rows = Mapping[int, Row]
"""Rows by the index of their place."""

WINDOW = 32
"""Largest number of a question's last positions at which engines in this process are compared."""


@dataclass(frozen=True)
class Question:
    """Tokens after which next tokens are compared, in the forms in which a server may be asked.

    Args:
        prompt: Token ids of the prompt.
        answer: First tokens of the adapted model's greedy answer in PyTorch.
        message: Message of the chat whose tokens the prompt is; None if the prompt is not a chat.
        texts: For each token of the answer, the text of all tokens before it; None where no text has these tokens.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    message: str | None = None
    texts: Sequence[str | None] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt with the answer, without the last token, after which nothing is compared."""
        return (*self.prompt, *self.answer[:-1])

    @property
    def window(self) -> range:
        """Positions of the tokens after which next tokens are compared on engines in this process."""
        return range(min(len(self.prompt) - 1, max(0, len(self.tokens) - WINDOW)), len(self.tokens))

    @property
    def answered(self) -> range:
        """Positions of the tokens after which the tokens of the answer follow."""
        return range(len(self.prompt) - 1, len(self.tokens))


class Model(NamedTuple):
    """Logprobs of a model at each place, and the largest that another token can have there.

    Args:
        rows: Row of each place, or of the first ones if the model was run on the first questions.
        floors: Largest logprob of a token that the row lacks, in nats.
        fault: Name of its fault; empty for a right model.
        detail: The fault in words.
        factor: Factor on every delta_W, for a fault that is one.
    """

    rows: Sequence[Row]
    floors: Sequence[float]
    fault: str = ""
    detail: str = ""
    factor: float | None = None

    def off(self, place: int, row: Row) -> list[float]:
        """Differences of logprobs from the model's; for a token that its row lacks, the smallest possible one."""
        mine, floor = self.rows[place], self.floors[place]
        return [value - mine[i] if i in mine else max(0.0, value - floor) for i, value in row.items()]


class FaultyModel(NamedTuple):
    """A model with a fault, which is run when it is asked for.

    Args:
        detail: The fault in words.
        run: Function that returns the model's answers to a number of first questions, or to all if the number is None.
    """

    fault: str
    detail: str
    run: Callable[[int | None], Model]


class Greedy(NamedTuple):
    """A greedy answer.

    Args:
        question: Index of the question.
        tokens: Its tokens, up to the first that the engine does not identify.
        length: Its number of tokens.
        rows: Its logprobs up to the first token that is not PyTorch's; empty if the engine returns none.
    """

    question: int
    tokens: Sequence[int]
    length: int
    rows: Rows


class AskedOnce(NamedTuple):
    """Answers of a model at places, each of which was asked for once.

    Args:
        rows: Their logprobs.
        told: Headers of each response, and its id.
    """

    rows: Rows
    told: Mapping[int, Mapping[str, str]]


class ReadChat(NamedTuple):
    """A chat as a server has read it, according to the tokens that the server returns or counts.

    Args:
        read: Number of tokens that the server has read.
        expected: Number of tokens of PyTorch's prompt.
        is_same: Whether they are the same tokens, or equally many if the server gives only their number.
    """

    read: int
    expected: int
    is_same: bool

    @classmethod
    def of(cls, told: Sequence[int] | int | None, expected: Sequence[int]) -> list[ReadChat]:
        """Compare the tokens that a server gives, or their number, with those expected; empty if it gives neither."""
        if isinstance(told, int):
            return [cls(told, len(expected), told == len(expected))]
        return [cls(len(told), len(expected), list(told) == list(expected))] if told else []


@dataclass(frozen=True)
class Answers:
    """Answers of an engine.

    Args:
        base: Logprobs of the base model.
        adapter: Logprobs of the adapter.
        greedy: The adapter's greedy answers.
        mixed: Logprobs of each arm while requests for another model run; empty if there are none.
        rounds: The adapter's answers to the same questions, asked again and again; the first are `adapter`.
        is_one_model: Whether the engine has one model under both names, so that it has no base model's answers.
        mixed_failure: Reason why mixed batches were not answered; None if they were, or need not be.
        without_mixed: Whether mixed batches were left out at the user's wish.
        responses: Every response to a request for logprobs; empty for an engine in this process.
        chats: Chats whose tokens the server gives; None if the prompts are not chats.
        template: Chat template of a server beside the recorded one; None if it was not asked for.
        without_template: Whether a recorded chat template was not compared at the user's wish.
    """

    base: Rows
    adapter: Rows
    greedy: Sequence[Greedy] = ()
    mixed: Mapping[str, Rows] = field(default_factory=dict)
    rounds: Sequence[AskedOnce] = ()
    is_one_model: bool = False
    mixed_failure: str | None = None
    without_mixed: bool = False
    responses: Sequence[Response] = ()
    chats: Sequence[ReadChat] | None = None
    template: TemplateReading | None = None
    without_template: bool = False


class Models(ABC):
    """Questions, and the models that answer them.

    A place is a token of an answer, or one before it, with the index of its question and its step: 0 for the first
    token of the answer, and negative for tokens of the prompt.

    Attributes:
        questions: The questions.
        places: Question and step of each place, in their order.
        base: The base model.
        adapter: The adapted model.
        vocabulary: Number of tokens of the base model.
        sensitivity: Ratio by which rounding moves the adapted model further than the base model.
        ends: Ids of the tokens that end a text.
        factors: Factors on every delta_W that the search tries first.
        conversations: Conversations in the chat template that the adapter was trained with; none if they are not known.
        weights: Served weights that PyTorch ran the base model on, in words; None if they are the base model's own.
        coarseness: Number format of the served weights; None if they are the base model's own.
        finest: The finest number format of all served weights that are known, of which these fit best.
    """

    questions: Sequence[Question]
    places: Sequence[tuple[int, int]]
    base: Model
    adapter: Model
    vocabulary: int
    sensitivity: float
    ends: frozenset[int]
    factors: Sequence[float]
    conversations: Conversations = Conversations()
    weights: str | None = None
    coarseness: str | None = None
    finest: str | None = None

    def first(self, question: int) -> int:
        """The place of the first token of an answer."""
        return self.places.index((question, 0))

    def read(self, place: int) -> list[int]:
        """All tokens before the token of a place."""
        index, step = self.places[place]
        question = self.questions[index]
        return [*question.prompt, *question.answer][: len(question.prompt) + step]

    def kept(self, place: int) -> Collection[int]:
        """Tokens whose logprobs are known at a place."""
        return self.base.rows[place].keys()

    def recorded(self, arm: str) -> Sequence[Model]:
        """Recorded faults of an arm; none where PyTorch runs them."""
        return ()

    def beside(self, answers: Answers) -> Models:
        """Return the models with the logprobs of the tokens that an engine returned, if they can be computed.

        Args:
            answers: The engine's answers.
        """
        return self

    @abstractmethod
    def text(self, place: int) -> str | None:
        """Text that has exactly the tokens that are read at a place; None if there is none."""

    @abstractmethod
    def rounding(self, number_format: str) -> float:
        """Distance of the base model in a number format from the right one, in nats."""

    def sensitivity_in(self, number_formats: Sequence[str]) -> float:
        """The largest sensitivity in some number formats; here that of bfloat16 stands for all."""
        return self.sensitivity

    @abstractmethod
    def bias(self, number_format: str) -> float:
        """Strength of the right adapter if PyTorch computes in a number format."""

    @abstractmethod
    def scaled(self, factor: float, questions: int | None = None) -> Model:
        """The adapted model with a factor on every delta_W, on the first questions, or on all."""

    @abstractmethod
    def adapter_faults(self) -> Iterable[FaultyModel]:
        """Adapted models with faults."""

    @abstractmethod
    def base_faults(self) -> Iterable[FaultyModel]:
        """Base models with faults."""

    @abstractmethod
    def with_coarse_caches(self) -> Iterable[Model]:
        """The base model with keys and values in float8, for each way in which engines round them."""
