"""Logits of all tokens, as PyTorch and engines in this process give them, and the rows that are kept of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraover.common.errors import EngineError
from loraover.common.request import as_written
from loraover_serve.judge.models import Models, Row

Floats = NDArray[np.float32]


class Expected:
    """PyTorch's logprobs of one model, of the entire vocabulary.

    Args:
        rows: Logprobs after positions of questions, by the index of the question and the position.
    """

    def __init__(self, rows: Mapping[tuple[int, int], Floats]) -> None:
        self._rows = rows

    @classmethod
    def of(cls, positions: Sequence[range], found: Iterable[Any], *, in_file: bool = False) -> Expected:
        """Logprobs after the last positions of each question, from its logits; see `last_rows`."""
        asked = enumerate(zip(positions, found, strict=True))
        rows = (last_rows(index, at, logits, in_file=in_file) for index, (at, logits) in asked)
        return cls({place: row for mine in rows for place, row in mine.items()})

    def __contains__(self, place: tuple[int, int]) -> bool:
        """Whether the model was run at a place."""
        return place in self._rows

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return len(next(iter(self._rows.values())))

    def at(self, question: int, position: int) -> Floats:
        """Logprobs of the entire vocabulary at a place."""
        return self._rows[question, position]


def last_rows(index: int, positions: range, logits: Any, *, in_file: bool = False) -> dict[tuple[int, int], Floats]:
    """Logprobs after the last positions of a question, from the logits of its last positions, (positions, vocabulary).

    Args:
        index: Index of the question.
        logits: The logits, at these positions or at more before them.
        in_file: Whether the logprobs are kept in a file.
    """
    kept = np.asarray(logits[-len(positions) :], dtype=np.float32)
    logprobs = np.empty_like(kept)
    for row, out in zip(kept, logprobs, strict=True):  # each stays in a processor's cache
        np.subtract(row, row.max(), out=out)
        out -= np.log(np.exp(out).sum(dtype=np.float64))
    logprobs = in_a_file(logprobs) if in_file else logprobs
    return {(index, position): row for position, row in zip(positions, logprobs, strict=True)}


def in_a_file(numbers: Floats) -> Floats:
    """A copy in a file without a name, whose memory the kernel may take back."""
    with tempfile.TemporaryFile() as file:
        held = np.memmap(file, np.float32, "w+", shape=numbers.shape)
    held[:] = numbers
    held.flush()  # a page that is not on the disk yet cannot be taken
    return np.asarray(held)


def kept_rows(models: Models, index: int, logits: Any, engine: str) -> dict[int, Row]:
    """Rows of a question with the tokens that the models have, from an engine's logits after each of its tokens.

    Args:
        index: Index of the question.
        logits: The logits, (tokens, vocabulary).

    Raises:
        EngineError: Logits that are not finite, or of another vocabulary.
    """
    question = models.questions[index]
    if (size := logits.shape[-1]) != models.vocabulary:
        raise EngineError(of_another_vocabulary(engine, size, models.vocabulary))
    rows = last_rows(index, question.window, logits)
    if not all(np.isfinite(row).all() for row in rows.values()):
        raise EngineError(f"{engine}: a logprob is not a finite number.")
    places = {(q, len(models.questions[q].prompt) - 1 + step): p for p, (q, step) in enumerate(models.places)}
    return {places[at]: row_of(row, [*models.kept(places[at])]) for at, row in rows.items()}


def row_of(logprobs: Floats, ids: list[int] | NDArray[np.int64]) -> Row:
    """The row with the logprobs of the given tokens."""
    return dict(zip(np.asarray(ids).tolist(), logprobs[ids].tolist(), strict=True))


def of_another_vocabulary(engine: str, size: int, vocabulary: int) -> str:
    """Message about an engine that has other tokens than the base model."""
    return (
        f"{engine}: answers with {size} tokens or more, and the base model has {vocabulary}; it serves another "
        f"model. Name the base model with {as_written('model')}."
    )
