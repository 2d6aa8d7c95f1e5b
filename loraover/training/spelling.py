"""Texts of training examples, as their trainer gives them to the tokenizer: chat messages through the chat template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2

from loraover.common.errors import DataError
from loraover.data.formats import TEXTS, Row
from loraover.data.sources import Rows


def answers(row: Row) -> list[str | None]:
    """Return the columns that end an example; None for one that is its prompt alone."""
    return [name for name in ("completion", "chosen", "rejected", "messages", "text") if name in row] or [None]


def is_chat(row: Row) -> bool:
    """Whether any part of an example is chat messages."""
    return not all(isinstance(row[part], str) for part in (*filter(None, answers(row)), *({"prompt"} & row.keys())))


def spelt(row: Row, part: str | None, reads: Any) -> str:
    """Return the text of a prompt, with one of its answers unless that is None."""
    pieces = [row[name] for name in ("prompt", part) if name is not None and name in row]
    if all(isinstance(piece, str) for piece in pieces):
        return "".join(pieces)
    options = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}
    messages = [_without_places(message) for piece in pieces for message in piece]
    text: str = reads.apply_chat_template(messages, tokenize=False, add_generation_prompt=part is None, **options)
    return text


REFUSALS = (jinja2.TemplateError, TypeError, ValueError)
"""What a chat template raises for messages that it does not expect."""


def whole_texts(rows: Rows, reads: Any) -> list[list[str]]:
    """Return the texts of each example, one for each of its answers.

    Args:
        rows: The examples.
        reads: The tokenizer, or what reads the rows' images besides.

    Raises:
        DataError: The chat template refuses a row, or leaves out the tools, their calls or the system prompt of the
            first row that has them.
    """
    found, untried = [], dict(WITHOUT)
    for i, row in enumerate(rows.rows):
        where, parts = f"{rows.origin}: row {rows.number(i)}", answers(row)
        try:
            found.append([spelt(row, part, reads) for part in parts])
        except REFUSALS as error:
            raise DataError(f"{where}: the model's chat template refuses it: {error}") from error
        for kind, without in [*untried.items()] if is_chat(row) else ():
            if (other := without(row)) != row:
                del untried[kind]
                if _text_or_none(other, parts[0], reads) == found[-1][0]:
                    raise DataError(f"{where} has {kind}, which the model's chat template leaves out; remove them.")
    return found


def _text_or_none(row: Row, part: str | None, reads: Any) -> str | None:
    try:
        return spelt(row, part, reads)
    except REFUSALS:
        return None


def _without_tools(row: Row) -> Row:
    return {name: part for name, part in row.items() if name != "tools"}


def _without_calls(row: Row) -> Row:
    return _with_messages(row, lambda one: {name: part for name, part in one.items() if name != "tool_calls"})


def _with_another_system(row: Row) -> Row:
    return _with_messages(row, lambda one: one | {"content": "another"} if one["role"] == "system" else one)


def _with_messages(row: Row, change: Callable[[Row], Row]) -> Row:
    chats = {name: part for name, part in row.items() if name in TEXTS and isinstance(part, list)}
    return row | {name: [change(message) for message in part] for name, part in chats.items()}


WITHOUT = {"tools": _without_tools, "calls of tools": _without_calls, "system prompts": _with_another_system}
"""What a chat template may leave out, with the function that changes it in a row."""


def _without_places(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without the places of its images, whose tokens are counted by `picture_tokens`."""
    content = message.get("content")
    if not isinstance(content, list) or not any(part["type"] == "image" for part in content):
        return message
    return message | {
        "content": [part for part in content if part["type"] != "image"] or [{"type": "text", "text": ""}]
    }
