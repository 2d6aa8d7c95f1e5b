"""Base class of benchmarks, and readers of their questions."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraover.common.errors import ConfigError, DataError
from loraover.data.formats import check_encodes
from loraover.data.sources import read_raw

if TYPE_CHECKING:
    from loraover_lab.evaluation.request import EvaluationRequest
    from loraover_lab.evaluation.subjects import Answerer

Row = dict[str, Any]


@dataclass(frozen=True)
class Questions:
    """Checked rows, and their origin in words."""

    rows: list[Row]
    origin: str


@dataclass(frozen=True)
class Example:
    """Question and its answer.

    Args:
        id: Name of the question.
        score: 1 for right, 0 for wrong, or a value on the task's scale; None: there is no score.
        answer: What the model answered.
        expected: The right answer, where there is one.
        note: Reason of the score, where the answer does not show it.
    """

    id: str
    score: float | None
    answer: str
    expected: str = ""
    note: str = ""


@dataclass(frozen=True)
class TaskScores:
    """Measures of one model by name, and the examples behind them."""

    measures: dict[str, float]
    examples: list[Example]


Keep = Callable[[list[Example]], None]


class Task(ABC):
    """A benchmark.

    Attributes:
        is_right_or_wrong: Whether a score is 1 or 0.
        max_new_tokens: Largest number of tokens in an answer, unless the user asks for another.
        packages: Packages whose versions change the figures.
    """

    is_right_or_wrong: bool = True
    max_new_tokens: int
    packages: tuple[str, ...] = ()

    def check(self, request: EvaluationRequest) -> None:
        """Check before anything is loaded that no option is missing, unusable or without effect in this task."""
        if request.judge_url is not None:
            asked, task = request.named("judge_url"), request.named("task", "mtbench")
            raise ConfigError(f"{asked} is for {task}; answers of this task get no ratings.")

    @abstractmethod
    def read(self, request: EvaluationRequest) -> Questions:
        """Read the questions.

        Raises:
            DataError: No such data, or a row that lacks a field; the message has the row's number.
        """

    @abstractmethod
    def measure(self, subject: Answerer, questions: Questions, request: EvaluationRequest, keep: Keep) -> TaskScores:
        """Put the questions to one model.

        Args:
            subject: The model.
            questions: Questions that `read` returned.
            keep: Called with the answers before another service scores them, so that `rate` can do it later.

        Raises:
            LoraOverError: The model or its engine cannot answer, or the answers cannot be scored.
        """

    def rate(self, answered: list[Example], questions: Questions, request: EvaluationRequest) -> TaskScores:
        """Score answers that were kept, in the order of the questions; only tasks that another service scores do this.

        Raises:
            DataError: The answers belong to other questions, or to another task.
            EngineError: The service scores none of them.
        """
        raise DataError("the file holds answers without scores, which this task never writes; name a new file.")

    def settings(self, request: EvaluationRequest, tokenizer: Any) -> dict[str, str]:
        """Settings of the task that a reader needs to repeat the figures."""
        return {}


IN_CHAT_TEMPLATE = "chat template"
"""Settings of a task whose prompts are put into the chat template."""


def uses_chat(request: EvaluationRequest, tokenizer: Any) -> bool:
    """Whether questions are put into the chat template."""
    has_template = tokenizer.chat_template is not None
    wanted = request.apply_chat_template
    if wanted and not has_template:
        raise ConfigError(f"{request.named('apply_chat_template')}: the model's tokenizer has no chat template.")
    return has_template if wanted is None else wanted


def read_questions(
    source: str,
    read: Callable[[Mapping[str, Any], str], Row],
    *,
    split: str,
    subset: str | None = None,
    limit: int | None,
) -> Questions:
    """Read and check the first `limit` rows of a data source; `read` makes a question from a row and the row's name."""
    raw = read_raw(source, split=split, subset=subset)
    rows: list[Row] = []
    for number, row in raw.rows:
        if limit is not None and len(rows) >= limit:
            break
        where = f"{source}, row {number}"
        if isinstance(row, DataError):
            raise row
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected an object, found {type(row).__name__}.")
        rows.append(read(row, where))
    if not rows:
        raise DataError(f"{source}: holds no questions.")
    return Questions(rows, raw.origin)


def text_field(row: Mapping[str, Any], names: tuple[str, ...], where: str, *, may_be_empty: bool = False) -> str:
    """Read the text of the first of these fields that the row has."""
    name = next((name for name in names if name in row), None)
    if name is None:
        raise DataError(f"{where}: has fields {sorted(row)}; expected {' or '.join(map(repr, names))} among them.")
    if not isinstance(row[name], str):
        raise DataError(f"{where}: field {name!r} is {reprlib.repr(row[name])}, expected text.")
    if not may_be_empty and not row[name].strip():
        raise DataError(f"{where}: field {name!r} is empty.")
    check_encodes(row[name], name, where)
    return str(row[name])


def label_field(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> int:
    """Read the number of the label, which may be written as a number or a name."""
    label = row.get("label")
    if isinstance(label, str) and label in names:
        return names.index(label)
    if type(label) is int and 0 <= label < len(names):
        return label
    known = ", ".join(f"{number} or {name!r}" for number, name in enumerate(names))
    hint = "; GLUE's test splits have no labels" if label == -1 else ""
    raise DataError(f"{where}: field 'label' is {reprlib.repr(label)}, expected {known}{hint}.")
