"""What a benchmark supplies."""

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
    from loraover.evaluation.judge import Judge
    from loraover.evaluation.subjects import Subject
    from loraover.reporting.reporter import Reporter

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What the user asked for, whatever the task.

    Args:
        data: file, folder or hub name of the questions; None: where the task has them from.
        examples: number of questions, the first ones; None: all.
        max_new_tokens: of an answer; None: the task's own.
        chat: use the chat template where a task leaves that open; None: if the tokenizer has one.
        judge: of open answers.
    """

    data: str | None = None
    examples: int | None = None
    max_new_tokens: int | None = None
    chat: bool | None = None
    allow_code_execution: bool = False
    judge: Judge | None = None


@dataclass(frozen=True)
class Questions:
    """Checked rows, and where they come from."""

    rows: list[Row]
    origin: str


@dataclass(frozen=True)
class Example:
    """One question's outcome.

    Args:
        score: 1 right, 0 wrong, or on the task's scale; None: no score could be had.
        expected: the right answer, where there is one.
        note: why, where the score does not say it.
    """

    id: str
    score: float | None
    answer: str
    expected: str = ""
    note: str = ""


@dataclass(frozen=True)
class TaskScores:
    """One model's measures by name, and the examples behind them."""

    measures: dict[str, float]
    examples: list[Example]


Keep = Callable[[list[Example]], None]


class Task(ABC):
    """A benchmark."""

    is_right_or_wrong: bool = True
    max_new_tokens: int
    packages: tuple[str, ...] = ()  # whose versions the figures depend on

    def check(self, options: Options) -> None:  # noqa: B027, most tasks need nothing
        """Raise ConfigError if the options are not enough; nothing has been loaded yet."""

    @abstractmethod
    def read(self, options: Options) -> Questions:
        """The questions.

        Raises:
            DataError: no such data, or a row that lacks a field; the row is numbered.
        """

    @abstractmethod
    def measure(
        self, subject: Subject, questions: Questions, options: Options, report: Reporter, keep: Keep
    ) -> TaskScores:
        """Put the questions to one model.

        Args:
            keep: takes answers that `rate` can go on with, where scores are another service's.

        Raises:
            LoraOverError: the model or its engine cannot answer them, or nobody scores them.
        """

    def rate(self, answered: list[Example], questions: Questions, options: Options, report: Reporter) -> TaskScores:
        """Score answers that were kept, which only tasks that another service scores do.

        Raises:
            DataError: they are not answers to these questions, or of no such task.
            EngineError: nobody scores them.
        """
        raise DataError("the file holds answers without scores, which this task never leaves; name a new file.")

    def settings(self, options: Options, tokenizer: Any) -> dict[str, str]:
        """What else a reader needs to know to repeat the figures."""
        return {}


def uses_chat(options: Options, tokenizer: Any) -> bool:
    """Whether questions go into the chat template.

    Raises:
        ConfigError: there should be one, and is none.
    """
    has_template = tokenizer.chat_template is not None
    if options.chat and not has_template:
        raise ConfigError("--chat: the model's tokenizer has no chat template.")
    return has_template if options.chat is None else options.chat


def read_questions(
    source: str,
    read: Callable[[Mapping[str, Any], str], Row],
    *,
    split: str,
    subset: str | None = None,
    limit: int | None,
) -> Questions:
    """The first rows of a data source, each checked.

    Args:
        read: makes a question of a row; the string says which row it is.

    Raises:
        DataError: see `Task.read`.
    """
    raw = read_raw(source, split=split, subset=subset)
    rows: list[Row] = []
    for number, row in raw.rows:
        if limit is not None and len(rows) >= limit:
            break
        where = f"{source}, row {number}"
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected an object, found {type(row).__name__}.")
        rows.append(read(row, where))
    if not rows:
        raise DataError(f"{source}: holds no questions.")
    return Questions(rows, raw.origin)


def text_field(row: Mapping[str, Any], names: tuple[str, ...], where: str, *, may_be_empty: bool = False) -> str:
    """The text under the first of these names.

    Raises:
        DataError: none of them, or no text there.
    """
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
    """The number of the label, which may be written as number or name.

    Raises:
        DataError: neither.
    """
    label = row.get("label")
    if isinstance(label, str) and label in names:
        return names.index(label)
    if type(label) is int and 0 <= label < len(names):
        return label
    known = ", ".join(f"{number} or {name!r}" for number, name in enumerate(names))
    hint = "; GLUE's test splits have no labels" if label == -1 else ""
    raise DataError(f"{where}: field 'label' is {reprlib.repr(label)}, expected {known}{hint}.")
