"""Port of the judge: measurements of an engine's answers beside models of which it knows nothing else.

A side has the answers and the models: PyTorch's own with NumPy, or recorded ones in plain Python. A change is always
that of logprobs at one position, of the tokens that both arms have there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from statistics import fmean, median_low
from typing import TYPE_CHECKING, Any, NamedTuple

from loraover_serve.judge.results import Off

if TYPE_CHECKING:
    from loraover.client.speaker import Response

Model = Any
"""A model as a side has it; the judge only hands it back."""


class Change(NamedTuple):
    """A change at one position, along a direction.

    Args:
        prompt: Index of the prompt.
        tokens: Number of tokens whose logprobs are compared.
        along: Product of the change and the direction, in square nats.
        size: Square of the direction.
        total: Square of the change.
        rest: Square of what sets the change apart from the direction.
        source: What the response said of itself: its headers, and its id. Only `Evidence.repeated` has it.
    """

    prompt: int
    tokens: int
    along: float
    size: float
    total: float
    rest: float
    source: Mapping[str, str] = {}


class Repeat(NamedTuple):
    """Answer of the adapter at a position, to a question that may have been asked several times.

    Args:
        change: What it changes, along what the adapter changes.
        apart: RMS difference, in nats, from the answer to the same question that is nearest to the right adapter's;
            None for that answer.
    """

    change: Change
    apart: float | None


class ComparedAnswer(NamedTuple):
    """A greedy answer beside PyTorch's.

    Args:
        expected: PyTorch's tokens.
        tokens: The engine's tokens, up to the first that it does not identify.
        length: Number of the engine's tokens.
        gap: By how much PyTorch prefers its own token where the answer first has another one, in nats.
        is_base: Whether the other token is the likeliest of the base model.
    """

    expected: Sequence[int]
    tokens: Sequence[int]
    length: int
    gap: float = 0.0
    is_base: bool = False

    @property
    def parted(self) -> int | None:
        """Index of the first token that is not PyTorch's; None if there is none."""
        pairs = enumerate(zip(self.expected, self.tokens, strict=False))
        return next((index for index, (one, other) in pairs if one != other), None)

    def is_complete(self, ends: AbstractSet[int]) -> bool:
        """Whether the beginning of the expected answer is all of it, or all before the end of the text.

        Servers return the token of the end of the text or leave it out.

        Args:
            ends: Ids of the tokens that end a text.
        """
        tokens, expected = self.tokens, self.expected
        return self.length >= len(expected) or tokens[-1] in ends or expected[len(tokens)] in ends


class FaultyModel(NamedTuple):
    """A model with a fault.

    Args:
        fault: Name of the fault.
        detail: The fault in words.
        run: The model's answers to the first prompts, or to as many as there are if the number is None.
    """

    fault: str
    detail: str
    run: Callable[[int | None], Model]


class ReadChat(NamedTuple):
    """A chat as a server has read it, by what the server says of its tokens.

    Args:
        read: Number of tokens that the server has read.
        expected: Number of tokens of PyTorch's prompt.
        is_same: Whether they are the same tokens, or as many if the server tells no more.
    """

    read: int
    expected: int
    is_same: bool

    @classmethod
    def of(cls, told: Sequence[int] | int | None, expected: Sequence[int]) -> list[ReadChat]:
        """The chat in a list, which is empty if the server tells nothing."""
        if isinstance(told, int):
            return [cls(told, len(expected), told == len(expected))]
        return [cls(len(told), len(expected), list(told) == list(expected))] if told else []


class Evidence(ABC):
    """Answers of an engine, and the models to compare them with.

    Attributes:
        base: The base model.
        adapter: The adapted model.
        sensitivity: Ratio by which rounding moves the adapted model further than the base model.
        ends: Ids of the tokens that end a text.
        factors: Factors on every delta_W that are tried first.
        is_one_model: Whether the engine has one model under both names, so that it has no base model's answers.
        asked: Number of prompts.
        compared: Which tokens are compared, in words.
        mixed_failure: Reason why mixed batches were not answered; None if they were, or need not be.
        without_mixed: Whether nobody asked for mixed batches.
        responses: Every response of a server whose logprobs were asked for; none of an engine in this process.
        chats: Chats whose tokens the server tells; None if prompts are no chats.
    """

    base: Model
    adapter: Model
    sensitivity: float
    ends: frozenset[int]
    factors: Sequence[float]
    is_one_model: bool
    asked: int
    compared: str
    mixed_failure: str | None
    without_mixed: bool = False
    responses: Sequence[Response] = ()
    chats: Sequence[ReadChat] | None = None

    @abstractmethod
    def off(self, arm: str, model: Model) -> list[Off]:
        """Return the differences of an arm's answers from a model's, where the model was run."""

    @abstractmethod
    def changes(self, model: Model, start: Model) -> list[Change]:
        """Project what the engine's adapter changes beyond `start` on the direction from `start` to the model.

        The places are in one order; of a model that was run on few prompts there are the first ones alone.
        """

    def repeated(self) -> Sequence[Repeat]:
        """Every answer of the adapter to the questions; empty if no question was asked more than once."""
        return ()

    @abstractmethod
    def base_changes(self, model: Model) -> list[Change]:
        """Project the error of the engine's base model on the difference of the model from the right base model."""

    @abstractmethod
    def base_logprobs(self) -> list[Change]:
        """Project the error of the engine's base model on the logprobs themselves, both without their means."""

    @abstractmethod
    def base_repeats(self) -> list[Change]:
        """Project the error of the engine's base model on a lowering of the tokens that were read, without means."""

    @abstractmethod
    def decoded(self) -> list[Change]:
        """Return what greedy answers of the adapter change in the base model, from the second token on."""

    @abstractmethod
    def generated(self) -> Iterable[ComparedAnswer]:
        """The adapter's greedy answers."""

    @abstractmethod
    def mixed(self) -> Mapping[str, Sequence[Off]]:
        """Return the differences of answers in mixed batches from the same arm's alone; empty if there are none."""

    @abstractmethod
    def rounding(self, number_format: str) -> float:
        """Distance of the base model in a number format from the right one, in nats."""

    @abstractmethod
    def bias(self, number_format: str) -> float:
        """Strength of the right adapter if PyTorch computes in a number format."""

    @abstractmethod
    def scaled(self, factor: float, prompts: int | None = None) -> Model:
        """The adapted model with a factor on every delta_W."""

    @abstractmethod
    def adapter_faults(self) -> Iterable[FaultyModel]:
        """Adapted models with faults."""

    @abstractmethod
    def base_faults(self) -> Iterable[FaultyModel]:
        """Base models with faults."""

    @abstractmethod
    def with_coarse_caches(self) -> Iterable[Model]:
        """The base model with keys and values in float8, for each way in which engines round them."""


def apart(changes: Sequence[Change]) -> float:
    """RMS distance of changes from their directions, in nats; infinite if there are none."""
    return math.sqrt(fmean(each.rest / each.tokens for each in changes)) if changes else math.inf


def by_prompt(found: Sequence[Off]) -> dict[int, float]:
    """RMS difference of each prompt, in nats."""
    return {prompt: math.sqrt(fmean(mine)) for prompt, mine in _squares(found).items()}


def middle_by_prompt(found: Sequence[Off]) -> dict[int, float]:
    """Difference, in nats, that more than half of each prompt's positions reach: a few odd ones do not move it."""
    return {prompt: math.sqrt(median_low(mine)) for prompt, mine in _squares(found).items()}


def _squares(found: Sequence[Off]) -> Mapping[int, list[float]]:
    squares = defaultdict[int, list[float]](list)
    for each in found:
        squares[each.prompt].append(each.square)
    return squares
