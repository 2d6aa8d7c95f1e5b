"""Compared answers: logprobs of next tokens after the same tokens, as PyTorch and an engine give them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraover_serve.judge.limits import ADAPTER as ADAPTER
from loraover_serve.judge.limits import BASE as BASE
from loraover_serve.judge.limits import OTHER as OTHER

WINDOW = 32
"""Positions of a question that are compared at most, the last ones: logits of all would fill the memory."""


@dataclass(frozen=True)
class Question:
    """Tokens after which next tokens are compared.

    Args:
        prompt: Token ids of the prompt.
        continuation: First tokens of the adapted model's greedy answer in PyTorch.
    """

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt with the continuation, without the last token, after which nothing is compared."""
        return (*self.prompt, *self.continuation[:-1])

    @property
    def window(self) -> range:
        """Positions of the tokens after which engines in this process are compared: at least those of the answer."""
        return range(min(len(self.prompt) - 1, max(0, len(self.tokens) - WINDOW)), len(self.tokens))

    @property
    def answered(self) -> range:
        """Positions of the tokens after which the tokens of the continuation follow."""
        return range(len(self.prompt) - 1, len(self.tokens))


@dataclass(frozen=True)
class Row:
    """Logprobs of the next token after one position of a question.

    Args:
        question: Index of the question.
        position: Index of the last token that was read.
        logprobs: Logprobs in nats, of the entire vocabulary or of the tokens in `ids`.
        ids: Token ids; None means the entire vocabulary in order.
    """

    question: int
    position: int
    logprobs: NDArray[np.float32]
    ids: NDArray[np.int64] | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Question and position."""
        return self.question, self.position


Rows = Sequence[Row]


@dataclass(frozen=True)
class GreedyAnswer:
    """A greedy answer to one question.

    Args:
        tokens: Its tokens, up to the first that the engine does not identify.
        length: Its number of tokens.
        rows: Its logprobs, as far as its tokens are PyTorch's; empty if the engine does not return them.
    """

    tokens: tuple[int, ...]
    length: int
    rows: tuple[Row, ...] = ()


def last_rows(index: int, positions: range, logits: Any, *, in_file: bool = False) -> list[Row]:
    """Rows of the last positions of a question, from the logits of its last positions, (positions, vocabulary).

    Args:
        index: Index of the question.
        positions: The positions.
        logits: The logits, at these positions or at more before them.
        in_file: Whether the rows are kept in a file.
    """
    kept = np.asarray(logits[-len(positions) :], dtype=np.float64)
    kept -= kept.max(-1, keepdims=True)
    kept -= np.log(np.exp(kept).sum(-1, keepdims=True))
    logprobs = in_a_file(kept.astype(np.float32)) if in_file else kept.astype(np.float32)
    return [Row(index, position, row) for position, row in zip(positions, logprobs, strict=True)]


def in_a_file(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy in a file without a name, whose memory the kernel may take back."""
    with tempfile.TemporaryFile() as file:
        held = np.memmap(file, np.float32, "w+", shape=numbers.shape)
    held[:] = numbers
    held.flush()  # a page that is not on the disk yet cannot be taken
    return np.asarray(held)


def paired(one: Rows, other: Rows) -> list[tuple[Row, Row]]:
    """Rows of two arms at the same places, each with the tokens that both arms have; places without any are left out.

    Args:
        one: Rows of one arm.
        other: Rows of the other arm.
    """
    places = {row.place: row for row in other}
    pairs = (shared(row, places[row.place]) for row in one if row.place in places)
    return [pair for pair in pairs if len(pair[0].logprobs)]


def shared(one: Row, other: Row) -> tuple[Row, Row]:
    """Two rows of one place with the tokens that both have."""
    if one.ids is None or other.ids is None:
        return one, other
    ids, here, there = np.intersect1d(one.ids, other.ids, return_indices=True)
    return Row(*one.place, one.logprobs[here], ids), Row(*one.place, other.logprobs[there], ids)


class Expected:
    """PyTorch's logprobs of one model, by question and position.

    Args:
        rows: Rows of the entire vocabulary.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = {row.place: row.logprobs for row in rows}

    def __contains__(self, row: Row) -> bool:
        """Whether the model was run at the place of a row."""
        return row.place in self._rows

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return len(next(iter(self._rows.values())))

    def like(self, row: Row) -> NDArray[np.float64]:
        """Logprobs at the position of another row, of the tokens that it has."""
        mine = self._rows[row.place]
        return (mine if row.ids is None else mine[row.ids]).astype(np.float64)

    def at(self, question: int, position: int) -> NDArray[np.float32]:
        """Logprobs of the entire vocabulary."""
        return self._rows[question, position]
