"""Everything that an engine answers to the questions, as the judge reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from loraover_serve.judge.models import Rows

if TYPE_CHECKING:
    from loraover.client.speaker import Response


class Greedy(NamedTuple):
    """A greedy answer.

    Args:
        question: Index of the question.
        tokens: Its tokens, up to the first that the engine does not identify.
        length: Its number of tokens.
        rows: Its logprobs, as far as its tokens are PyTorch's; empty if the engine does not return them.
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


@dataclass(frozen=True)
class Answers:
    """Answers of an engine.

    Args:
        base: Logprobs of the base model.
        adapter: Logprobs of the adapter.
        greedy: The adapter's greedy answers.
        mixed: Logprobs of each arm, asked for beside those of another model; empty if there are none.
        rounds: The adapter's answers to the same questions, asked again and again; the first are `adapter`.
        is_one_model: Whether the engine has one model under both names, so that it has no base model's answers.
        mixed_failure: Reason why mixed batches were not answered; None if they were, or need not be.
        without_mixed: Whether nobody asked for mixed batches.
        responses: Every response of a server whose logprobs were asked for; none of an engine in this process.
        chats: Chats whose tokens the server tells; None if prompts are no chats.
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
