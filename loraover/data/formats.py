"""Formats of data sets, and their conversion into prompt and completion."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from loraover.common.errors import DataError
from loraover.data.glue import GLUE_TASKS, glue_reader

Row = dict[str, Any]

# Taori et al. 2023, Stanford Alpaca
ALPACA_TURN = "### Instruction:\n{}\n\n### Response:\n"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    + ALPACA_TURN
)
SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class RowFormat(NamedTuple):
    """Format of rows.

    Args:
        read: Function that yields the examples of a row; its second argument is the row's place, for messages.
        fields: Fields by which the format is recognised; None means that it is used only by name.
        template: Template around a prompt of text that is not written as chat messages.
    """

    read: Callable[[Mapping[str, Any], str], Iterator[Row]]
    fields: frozenset[str] | None = None
    template: str = "{}"


def read_row(row: Any, format: str, chat: bool, where: str) -> Iterator[Row]:
    """Yield the examples of a row, each with `prompt` and `completion`.

    Args:
        row: The row, as its source holds it.
        format: Key of `FORMATS`, or "auto" to recognise the format by the fields.
        chat: Whether to write text as chat messages.
        where: Place of the row, for messages.

    Raises:
        DataError: The row does not fit the format.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, found {type(row).__name__}.")
    found = FORMATS[_recognised(row, where) if format == "auto" else format]
    for example in found.read(row, where):
        for part in ("prompt", "completion"):
            if not any(text.strip() for text in _texts(example[part])):
                raise DataError(f"{where}: the {part} is empty; leave such rows out with data.keep.")
        if isinstance(example["prompt"], str):
            yield as_chat(example) if chat else example | {"prompt": found.template.format(example["prompt"])}
        else:
            yield example


def _texts(part: Any) -> list[str]:
    """Return the texts of a prompt or completion."""
    return [part] if isinstance(part, str) else [str(message["content"] or "") for message in part]


def as_chat(example: Row) -> Row:
    """Write a prompt and completion of text as one user message and one assistant message."""
    return {
        "prompt": [{"role": "user", "content": example["prompt"].strip()}],
        "completion": [{"role": "assistant", "content": example["completion"].strip()}],
    }


def _recognised(row: Row, where: str) -> str:
    known = {name: format.fields for name, format in FORMATS.items() if format.fields is not None}
    for name, fields in known.items():
        if fields <= row.keys():
            return name
    expected = " or ".join(f"{sorted(fields)} ({name})" for name, fields in known.items())
    raise DataError(f"{where}: has fields {sorted(row)}; expected {expected}.")


def _prompt_completion(row: Mapping[str, Any], where: str) -> Iterator[Row]:
    prompt, completion = _field(row, "prompt", where), _field(row, "completion", where)
    if type(prompt) is not type(completion):
        raise DataError(f"{where}: prompt and completion must both be text or both be chat messages.")
    yield {"prompt": prompt, "completion": completion}


def _messages(row: Mapping[str, Any], where: str) -> Iterator[Row]:
    """Yield one example per assistant turn, with all messages before it as its prompt."""
    messages = _field(row, "messages", where)
    if isinstance(messages, str):
        raise DataError(f"{where}: messages is text, expected a list of objects with role and content.")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    if not turns:
        raise DataError(f"{where}: messages holds no assistant turn to learn from.")
    for i in turns:
        yield {"prompt": messages[:i], "completion": [messages[i]]}


def _conversations(row: Mapping[str, Any], where: str) -> Iterator[Row]:
    """Yield text for one question and its answer, and chat messages for a longer conversation."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(t, dict) and {"from", "value"} <= t.keys() for t in turns):
        raise DataError(f"{where}: field 'conversations' is not a list of objects with from and value.")
    if unknown := [turn["from"] for turn in turns if turn["from"] not in SPEAKERS]:
        raise DataError(f"{where}: unknown speaker {reprlib.repr(unknown[0])}, expected one of {', '.join(SPEAKERS)}.")
    messages = [{"role": SPEAKERS[turn["from"]], "content": _field(turn, "value", where)} for turn in turns]
    if [message["role"] for message in messages] == ["user", "assistant"]:
        yield {"prompt": messages[0]["content"], "completion": messages[1]["content"]}
    else:
        yield from _messages({"messages": messages}, where)


def _instruction(row: Mapping[str, Any], where: str) -> Iterator[Row]:
    prompt = _text(row, "instruction", where)
    if row.get("input"):
        prompt += f"\n\n### Input:\n{_text(row, 'input', where)}"
    yield {"prompt": prompt, "completion": _text(row, "output", where)}


def _gsm8k(row: Mapping[str, Any], where: str) -> Iterator[Row]:
    question, answer = _field(row, "question", where), _field(row, "answer", where)
    yield {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}


def _metamath(row: Mapping[str, Any], where: str) -> Iterator[Row]:
    """Yield a question as in `gsm8k`, and its answer without the repetition "The answer is: 42" at its end."""
    answer = _text(row, "response", where).partition("\nThe answer is:")[0]
    yield {"prompt": f"Question: {_text(row, 'query', where)}\nAnswer:", "completion": f" {answer}"}


def _codefeedback(row: Mapping[str, Any], where: str) -> Iterator[Row]:
    """Yield the answer up to the end of its first block of code."""
    before, fence, rest = _text(row, "answer", where).partition("```")
    if not fence:
        raise DataError(f"{where}: field 'answer' holds no block of code; leave such rows out with data.keep.")
    yield {"prompt": _text(row, "query", where), "completion": before + fence + rest.partition("```")[0] + fence}


FORMATS: dict[str, RowFormat] = {
    "prompt-completion": RowFormat(_prompt_completion, frozenset({"prompt", "completion"})),
    "messages": RowFormat(_messages, frozenset({"messages"})),
    "gsm8k": RowFormat(_gsm8k, frozenset({"question", "answer"})),
    "instruction": RowFormat(_instruction, template=ALPACA),
    "conversations": RowFormat(_conversations, template=ALPACA),
    "metamath": RowFormat(_metamath),
    "codefeedback": RowFormat(_codefeedback, template=ALPACA),
    **{f"glue-{name}": RowFormat(glue_reader(task)) for name, task in GLUE_TASKS.items()},
}


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = _field(row, name, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} is a list, expected text.")
    return value


def _field(row: Mapping[str, Any], name: str, where: str) -> Any:
    value = row.get(name)
    if not isinstance(value, str | list) or not value or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{where}: field {name!r} is {reprlib.repr(value)}, expected text.")
    if isinstance(value, list) and not all(map(_is_message, value)):
        raise DataError(f"{where}: field {name!r} is not a list of objects with role and content, both text.")
    check_encodes(value if isinstance(value, str) else "".join(_texts(value)), name, where)
    return value


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"role", "content"} <= value.keys()
        and isinstance(value["role"], str)
        and isinstance(value["content"], str | None)
    )


def check_encodes(text: str, name: str, where: str) -> None:
    """Raise DataError if a text holds half a character (a lone surrogate, from an escape in JSON)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise DataError(
            f"{where}: field {name!r} holds {half!a}, half a character; correct or leave out the row."
        ) from error
